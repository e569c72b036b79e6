"""Makes the teacher cache: what the dense model says of every training token, asked once.

    python jobs/capture.py --config phi4_mini --dry-run
    python jobs/capture.py --teacher.k 64 --teacher.codec compact

The corpus is made first where it is missing. `jobs/cache.py` looks into the result.
`sparsekd capture` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["capture", *sys.argv[1:]]))
