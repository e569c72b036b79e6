"""Makes a language model smaller without losing what it knows: the whole cascade, resumable.

    python jobs/cascade.py                                        on this machine, with the laptop's settings
    python jobs/cascade.py --config jobs/configs/phi4_mini.yaml --dry-run
    ray job submit --working-dir . -- python jobs/cascade.py --execution.store s3://bucket/sparsekd

Submitting the same command again resumes; a finished run does nothing.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sparsekd_ray import cli
from sparsekd_ray.errors import SparseKDError
from sparsekd_ray.runtime import logging


def main() -> int:
    try:
        logging.setup()
        config, options = cli.parse(__doc__, sys.argv[1:])
        from sparsekd_ray.cascade import job  # after parsing: --help stays fast

        command = "python jobs/cascade.py " + shlex.join(sys.argv[1:])
        job.main(config, command.strip(), options.dry_run)
    except SparseKDError as error:
        return cli.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
