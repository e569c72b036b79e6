"""Evaluates a model on the held-out text of the corpus.

    python jobs/evaluate.py store/artifacts/distill/a0.5-lr0.001-s42-0123456789ab
    python jobs/evaluate.py /models/student --config my-run.yaml

The corpus is made first if it is missing. The model's tokenizer must be the corpus's.
`sparsekd evaluate` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
