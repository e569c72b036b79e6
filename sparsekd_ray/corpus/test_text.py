"""The raw test text of a corpus: the held-out documents before they are tokenised and cut into rows.

`test-text/<domain>.jsonl` holds one document a line, in the order of its source. Protocols that other people publish
start from this text rather than from packed rows:

    for domain in corpus.read_manifest(directory)["rows"]["test"]:
        documents = corpus.read_test_text(directory, domain)
        raw = "\\n\\n".join(row for document in documents for row in document.rows)   # GPTQ's protocol
        pages = [document.text for document in documents]                           # lm-eval's word perplexity
        words = sum(len(re.split(r"\\s+", page)) for page in pages)
        size = sum(len(page.encode()) for page in pages)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from sparsekd_ray.corpus.documents import Document
from sparsekd_ray.errors import CorpusError

FOLDER = "test-text"


def write_test_text(directory: Path, domain: str, documents: Iterable[Document]) -> None:
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"rows": document.rows, "text": document.text}) for document in documents)
    (folder / f"{domain}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def read_test_text(directory: Path, domain: str) -> list[Document]:
    """The test documents of one domain of the corpus in `directory`; CorpusError where there are none."""
    path = directory / FOLDER / f"{domain}.jsonl"
    if not path.is_file():
        raise CorpusError(f"{directory} holds no test text of {domain!r}: build the corpus again")
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [Document(tuple(row["rows"]), row["text"]) for row in rows]
