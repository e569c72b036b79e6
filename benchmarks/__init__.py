"""Measurements that `benchmarks` runs: ratios inside one run, medians of pairs, never part of the tests."""
