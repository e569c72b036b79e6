"""Prunes the dense model once, distills it from its own cached probabilities, and exports the student.

    python jobs/distill.py --sparsity 0.35 --prune.method neurons --distill.lr 3e-4
    ray job submit --working-dir . -- python jobs/distill.py --sparsity 0.35 --execution.store s3://bucket/sparsekd

Corpus, cache and pruned model are made first if they are missing. All cascades of the store share them.
`sparsekd distill` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["distill", *sys.argv[1:]]))
