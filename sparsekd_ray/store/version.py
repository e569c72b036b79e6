"""The format of a store: `<root>/store.json` holds its number.

The number is written before a store's first record and raised when older records can no longer be used.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sparsekd_ray.errors import StoreError
from sparsekd_ray.store.record import parse_object

if TYPE_CHECKING:
    from sparsekd_ray.store.artifacts import Store

FORMAT = 2
FILE = "store.json"


def stamp(store: Store) -> None:
    """Writes the number of the format into a new store."""
    if store.read_bytes(FILE) is None:
        store.write_text(FILE, json.dumps({"format": FORMAT}))


def check(store: Store) -> None:
    """Raises StoreError within seconds if the store does not answer or has another format."""
    text = store.read_hastily(FILE)
    if text is None and not any(key.endswith("/record.json") for key in store.list_keys("artifacts")):
        return
    number = 1 if text is None else parse_object(text).get("format")  # the first version wrote no such file
    if number != FORMAT:
        raise StoreError(
            f"Store {store.root} has format {number}; this version of sparsekd-ray reads and writes format {FORMAT}. "
            "Nothing was changed. Give another --execution.store, or remove this store."
        )
