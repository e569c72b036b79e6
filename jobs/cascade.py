"""Makes a language model smaller: runs the whole cascade of pruning and distillation.

    python jobs/cascade.py                                        on this machine, with the laptop's settings
    python jobs/cascade.py --config phi4_mini --dry-run           the plan: steps, sizes, memory per GPU
    ray job submit --working-dir . -- python jobs/cascade.py --execution.store s3://bucket/sparsekd

The same command resumes an interrupted run. A finished run does nothing. `sparsekd cascade` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["cascade", *sys.argv[1:]]))
