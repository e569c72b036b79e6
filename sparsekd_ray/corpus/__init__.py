"""Text sources → packed token shards with stable sample ids and domains. No training text repeats the test text.

`sources` reads documents from anywhere (`matching`, `files`, `template`, `documents`, `embedded`). `held_out` sets test
documents aside and leaves out training documents that repeat them (`splits`, `overlap`). `build` packs their tokens
(`tokens`, `packing`) into `shards`, and keeps the raw `test_text`. `identity` checks the sources before any work.
"""

from sparsekd_ray.corpus.build import build
from sparsekd_ray.corpus.documents import Document
from sparsekd_ray.corpus.held_out import train_documents
from sparsekd_ray.corpus.identity import check_hub, check_settings, identify
from sparsekd_ray.corpus.shards import (
    MANIFEST,
    Manifest,
    domain_streams,
    read_manifest,
    read_rows,
    read_shard,
)
from sparsekd_ray.corpus.sources import documents
from sparsekd_ray.corpus.splits import side
from sparsekd_ray.corpus.test_text import read_test_text
from sparsekd_ray.corpus.tokens import tokenizer_hash

__all__ = [
    "MANIFEST",
    "Document",
    "Manifest",
    "build",
    "check_hub",
    "check_settings",
    "documents",
    "domain_streams",
    "identify",
    "read_manifest",
    "read_rows",
    "read_shard",
    "read_test_text",
    "side",
    "tokenizer_hash",
    "train_documents",
]
