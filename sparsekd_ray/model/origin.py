"""The dense model of a directory and its licence, which every student's card repeats.

`sparsekd_origin.json` holds both, and licence files are copied with it. A directory without this file is a dense model.
Its own card (the front matter of README.md) then states the licence.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsekd_ray.errors import ModelError

logger = logging.getLogger(__name__)

FILE, CARD = "sparsekd_origin.json", "README.md"
LICENSE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")  # with any ending, in any case
LICENSE_PATTERNS = tuple(f"{form}*" for name in LICENSE_NAMES for form in (name, name.lower(), name.title()))

UNKNOWN = "unknown"  # the hub's own value for a licence that is not known
# In identifiers, such as cc-by-nc-nd-4.0, and in the titles of licence files. "All rights reserved" forbids as an
# identifier only: licences that allow everything open with it too.
FORBIDDEN_NAME = re.compile(
    r"(^|[-_ ])nd([-_ ]|$)|no[-_ ]?deriv|no[-_ ]?redistribution|all[-_ ]rights[-_ ]reserved", re.IGNORECASE
)
FORBIDDEN_TITLE = re.compile(r"\bno[-_ ]?deriv", re.IGNORECASE)
TITLE_LINES = 5  # of a licence file


@dataclass(frozen=True)
class Origin:
    """The dense model: its hub id where there is one, and its licence in the terms of a hub card."""

    base_model: str | None = None
    license: str = UNKNOWN
    license_name: str | None = None
    license_link: str | None = None


def read(directory: Path, hub_id: str | None = None) -> Origin:
    """The origin of a model directory: that of its `FILE`, or else what its card and its path state.

    hub_id: the dense model's, where it is known. Raises ModelError for a `FILE` that cannot be read.
    """
    if (path := directory / FILE).is_file():
        try:
            return Origin(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{path} is unreadable ({error}): remove it, or copy the model again") from error
    card, base_model = _front_matter(directory / CARD), hub_id or _cached_id(directory)
    licenses = _strings(card.get("license")) or [UNKNOWN]
    name, link = (", ".join(_strings(card.get(key))) or None for key in ("license_name", "license_link"))
    if len(licenses) > 1:  # "other" is the hub's value for a licence without an identifier
        return Origin(base_model, "other", name or ", ".join(licenses), link)
    return Origin(base_model, licenses[0], name, link)


def check_license(directory: Path, stated: Origin) -> None:
    """ModelError if the licence forbids changed copies, or copies at all. An unknown licence is no obstacle."""
    names = [text for text in (stated.license, stated.license_name) if text]
    reasons = [f"its card states {name!r}" for name in names if FORBIDDEN_NAME.search(name)]
    reasons += [
        f"{path.name} says {line!r}"
        for path in license_files(directory)
        for line in _title(path)
        if FORBIDDEN_TITLE.search(line)
    ]
    if reasons:
        raise ModelError(
            f"the licence of the dense model {stated.base_model or directory} forbids students: {reasons[0]}. A "
            "student is a changed copy of its dense model: choose a model whose licence allows changed copies"
        )


def pass_on(source: Path, out: Path) -> None:
    """Write the origin of `source` and its licence files to `out`."""
    write(read(source), out)
    for path in license_files(source):
        shutil.copyfile(path, out / path.name)


def write(stated: Origin, out: Path) -> None:
    (out / FILE).write_text(json.dumps(asdict(stated), indent=1) + "\n", encoding="utf-8")


def license_files(directory: Path) -> list[Path]:
    """Licences and notices of a model directory."""
    upper = ((path, path.name.upper()) for path in sorted(directory.iterdir()))
    return [path for path, name in upper if name.startswith(LICENSE_NAMES) and path.is_file()]


def _title(path: Path) -> list[str]:
    """The first lines with words of a licence file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = (line.strip() for line in file if re.search(r"\w", line))
        return list(itertools.islice(lines, TITLE_LINES))


def _front_matter(path: Path) -> Mapping[str, object]:
    """The metadata of a model card; empty, with a warning, if they cannot be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError) as error:
        logger.warning(
            f"{path} has unreadable metadata, so the model's licence is stated as unknown: {error}"
        )
        return {}


def _strings(value: object) -> list[str]:
    """The strings of a metadata value, which may be a single value, a list or nothing."""
    parts = value if isinstance(value, list) else [value]
    return [str(part) for part in parts if part]


def _cached_id(directory: Path) -> str | None:
    """The hub id of a snapshot in the hub's cache, …/models--owner--name/snapshots/revision; None elsewhere."""
    for folder in directory.absolute().parents:
        if folder.name.startswith("models--"):
            return folder.name.removeprefix("models--").replace("--", "/", 1)
    return None
