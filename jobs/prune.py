"""Prunes the dense model once, previews a pruning, or compares the methods.

    python jobs/prune.py --sparsity 0.35 --prune.method neurons                           a model that stock tools load
    python jobs/prune.py --energy 0.9 --prune.method svd                                  by SparseKD's energy threshold
    python jobs/prune.py preview --sparsity 0.35 --prune.method svd-whitened --prune.allocation optimal
    python jobs/prune.py compare --methods svd svd-whitened+optimal neurons --sparsity 0.15 0.65 --distill

`preview` measures the statistics that a pruning reads and prints its table, matrix by matrix. It makes no model.
`sparsekd prune` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["prune", *sys.argv[1:]]))
