"""Makes the teacher cache: the dense model's probabilities at every training token.

    python jobs/capture.py --config phi4_mini --dry-run
    python jobs/capture.py --teacher.k 64 --teacher.codec compact

The corpus is made first if it is missing. `jobs/cache.py` looks into the result.
`sparsekd capture` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["capture", *sys.argv[1:]]))
