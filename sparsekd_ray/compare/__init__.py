"""Compares pruning methods at equal sizes."""
