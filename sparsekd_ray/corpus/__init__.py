"""Text sources → packed token shards with stable sample ids, domains, and a held-out split by document.

`sources` and `rows` read documents from anywhere, `splits` decides their side, `build` packs their tokens,
`shards` is the form on disk.
"""

from sparsekd_ray.corpus.build import build
from sparsekd_ray.corpus.shards import (
    MANIFEST,
    domain_streams,
    read_manifest,
    read_rows,
    read_shard,
    tokenizer_hash,
)
from sparsekd_ray.corpus.sources import documents, identify
from sparsekd_ray.corpus.splits import side, train_documents
from sparsekd_ray.corpus.test_text import Document, read_test_text

__all__ = [
    "MANIFEST",
    "Document",
    "build",
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
