"""The spacing that WikiText puts around punctuation, and how it is undone before a model reads the text.

WikiText separates words and punctuation by spaces and writes `@-@`, `@,@` and `@.@` inside compounds and numbers.
lm-eval's task `wikitext` undoes this spacing by fixed replacements, and counts the words of the text before them. Its
published figures can only be compared with figures that make the same replacements in the same order, odd ones
included (` N ` becomes ` 1 `). One of its rules is left out here: it matches only text with two slashes (`/' 5/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MARKS = (" @-@ ", " @,@ ", " @.@ ")


def _literal(before: str, after: str) -> tuple[re.Pattern[str], str]:
    return re.compile(re.escape(before)), after


def _enclosed(opening: str, closing: str) -> tuple[re.Pattern[str], str]:
    """White space directly inside a pair of brackets or quotation marks is removed."""
    first, last = re.escape(opening), re.escape(closing)
    return re.compile(rf"{first}\s*([^{last}]*?)\s*{last}"), rf"{opening}\1{closing}"


REPLACEMENTS = (  # applied one after the other, each to the whole text
    _literal("s '", "s'"),
    *(_literal(mark, mark.strip(" @")) for mark in MARKS),
    *(_literal(f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(_enclosed(*pair) for pair in ("()", "[]", "{}", '""', "''")),
    *(_literal(" ".join("=" * depth), "=" * depth) for depth in (4, 3, 2)),  # of headings
    _literal(" ° ", "°"),
    _literal(" \n", "\n"),
    _literal("\n ", "\n"),
    _literal(" N ", " 1 "),
    _literal(" 's", "'s"),
)


def is_marked(texts: Iterable[str]) -> bool:
    """Whether any of the texts has one of WikiText's marks."""
    return any(mark in text for text in texts for mark in MARKS)


def without_spacing(text: str) -> str:
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text
