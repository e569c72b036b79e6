"""Verifies a teacher cache against its teacher, shows its content, or measures its size.

    python jobs/cache.py verify store/artifacts/cache/top32-0123456789ab
    python jobs/cache.py show   store/artifacts/cache/top32-0123456789ab manual-train-000007
    python jobs/cache.py stats  s3://bucket/sparsekd/artifacts/cache/top32-0123456789ab

The path of every cache is in the plan and in the report of its run. `sparsekd cache` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["cache", *sys.argv[1:]]))
