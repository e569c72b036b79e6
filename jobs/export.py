"""Exports a pruned or distilled model of the store to directories that stock tools load, with a model card.

    python jobs/export.py store/artifacts/distill/a0.5-lr0.001-s42-0123456789ab

Give the settings (--config) that the model was made with. The model and the dense model are evaluated first, for the
model card.
`sparsekd export` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
