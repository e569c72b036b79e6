"""Makes the token shards of the training text and of the held-out text, and the tokenizer they need.

    python jobs/corpus.py --config phi4_mini --dry-run
    ray job submit --working-dir . -- python jobs/corpus.py --config my-run.yaml --execution.store s3://bucket/sparsekd

`sparsekd corpus` is the same command.
"""

import sys

from sparsekd_ray import cli

if __name__ == "__main__":
    sys.exit(cli.main(["corpus", *sys.argv[1:]]))
