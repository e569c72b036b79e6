"""Text that every Python installation carries: prose, code and arithmetic without a download.

Four sets, each a stream of documents in an order that the seed decides:

- `docstrings`: all docstrings of one standard-library module, a document per module;
- `manual`: the language reference behind `help()`, a document per section. Its topics quote whole sections of
  each other ("if" is a part of "compound"), so topics would put the same text on both sides of a held-out
  split; sections, each kept once, do not;
- `code`: standard-library modules without docstrings and comments, a document per file;
- `arithmetic`: word problems with worked answers, eight to a document, without end.

The first three depend on the version of Python, which is therefore part of their identity.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

from sparsekd_ray.errors import CorpusError

T = TypeVar("T")

# Other people's code, generated tables, and the manual in another form.
_LEFT_OUT = {"idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"}
_TESTS = {"test", "tests", "idle_test"}
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_HEADING = re.compile(r"^(\S.*)\n([*=\-~^\"+])\2{2,}\n", re.MULTILINE)


def documents(name: str, seed: int | None) -> Iterator[str]:
    """Documents of one set, in sorted order or in that of `seed`; `CorpusError` for an unknown one."""
    if name not in _SETS:
        raise CorpusError(f"no embedded text called {name!r}; there are {', '.join(sorted(_SETS))}")
    return _SETS[name](seed)


def check(name: str) -> None:
    """Raises `CorpusError` unless the set exists and this Python installation holds its text."""
    next(documents(name, None))


def _docstrings(seed: int | None) -> Iterator[str]:
    return filter(None, map(_module_docstrings, _ordered(_library(), seed)))


def _code(seed: int | None) -> Iterator[str]:
    return filter(None, map(_module_code, _ordered(_library(), seed)))


def _manual(seed: int | None) -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(_stripped("the manual (pydoc_data/topics.py)")) from None
    sections = dict.fromkeys(section for name in sorted(topics) for section in _sections(topics[name]))
    yield from _ordered(list(sections), seed)


def _arithmetic(seed: int | None) -> Iterator[str]:
    for number in itertools.count():
        rng = random.Random(f"arithmetic {seed} {number}")
        yield "\n".join(_problem(rng) for _ in range(8))


_SETS: dict[str, Callable[[int | None], Iterator[str]]] = {
    "docstrings": _docstrings,
    "manual": _manual,
    "code": _code,
    "arithmetic": _arithmetic,
}


@cache
def _module_docstrings(path: Path) -> str:
    found = (ast.get_docstring(node) for node in _definitions(_parse(path)))
    text = "\n\n".join(filter(None, found))
    return text and f"{text}\n"


@cache
def _module_code(path: Path) -> str:
    tree = _parse(path)
    for node in _definitions(tree):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if node is tree else [ast.Pass()])
    return ast.unparse(tree) + "\n" if tree.body else ""


def _parse(path: Path) -> ast.Module:
    """Parsing is nearly all of the time these sets take: what comes of it (7 MB at most) stays in memory."""
    with warnings.catch_warnings():  # old escapes in other people's strings are no news to our user
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes())


def _library() -> list[Path]:
    """Source files of the standard library in sorted order, without tests, tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    tops = [root / name for name in sorted(sys.stdlib_module_names - _LEFT_OUT)]
    files = [path.with_suffix(".py") for path in tops if path.with_suffix(".py").is_file()]
    nested = [file for path in tops for file in sorted(path.rglob("*.py"))]
    files += [file for file in nested if not _TESTS & set(file.relative_to(root).parts)]
    if not files:
        raise CorpusError(_stripped(f"the standard library's source files ({root})"))
    return files


def _stripped(what: str) -> str:
    return (
        f"this Python installation ({sys.version.split()[0]}) lacks {what}: "
        "use a full installation, or another corpus source (a hub data set, or files)"
    )


def _ordered(items: list[T], seed: int | None) -> list[T]:
    return items if seed is None else random.Random(seed).sample(items, len(items))


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """The module, classes and functions at and below `node` in source order (walks statements only: fast)."""
    if isinstance(node, Definition):
        yield node
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield from _definitions(child)


def _sections(topic: str) -> list[str]:
    """Heading and body of each section; the rule under a heading depends on its depth, and goes."""
    before, *rest = _HEADING.split(topic)
    pairs = [("", before), *zip(rest[::3], rest[2::3], strict=True)]
    return [f"{title}\n\n{body.strip()}\n".lstrip() for title, body in pairs if body.strip()]


_PEOPLE = (
    "Ada Amir Bela Carlos Chen Dana Emma Farid Grace Hugo Ines Jonas Kofi Lena Maria Noor Omar Rosa Sam Uma"
)
_THINGS = "apples pears coins stamps marbles pencils books cards shells buttons eggs tickets beads plums cups"
# Question, worked answer, result. Sums are looked up by their own text in `_problem`.
_PROBLEMS = (
    (
        "{who} has {a} {what} and buys {b} boxes with {c} in each. How many {what} does {who} have now?",
        "The boxes hold {b} * {c} = {b*c} {what}. Together that is {a} + {b*c} = {a+b*c} {what}.",
        "a+b*c",
    ),
    (
        "{who} had {a} {what}, gave {b} of them to {friend} and lost {c}. How many {what} are left?",
        "Gone are {b} + {c} = {b+c} {what}. That leaves {a} - {b+c} = {a-b-c}.",
        "a-b-c",
    ),
    (
        "A crate holds {a} {what}. {who} fills {b} crates and takes out {c} broken {what}. How many remain?",
        "The crates hold {a} * {b} = {a*b} {what}. Without the broken ones, {a*b} - {c} = {a*b-c} remain.",
        "a*b-c",
    ),
    (
        "{who} earns {a} dollars a day and spends {c} of them on food. How much does {who} save in {b} days?",
        "Each day {a} - {c} = {a-c} dollars are left. In {b} days that is {a-c} * {b} = {(a-c)*b} dollars.",
        "(a-c)*b",
    ),
    (
        "{who} walks {b} km every morning and {c} km every evening. How many km are that in {a} days?",
        "In a day {who} walks {b} + {c} = {b+c} km. In {a} days that is {b+c} * {a} = {(b+c)*a} km.",
        "(b+c)*a",
    ),
    (
        "{who} shares {a*b} {what} equally among {b} children. Each gives {c} back. How many does each keep?",
        "Each child gets {a*b} / {b} = {a} {what} and keeps {a} - {c} = {a-c}.",
        "a-c",
    ),
    (
        "A train covers {a} km an hour and waits an hour at each of {c} stops. How long do {a*b} km take?",
        "It moves for {a*b} / {a} = {b} hours. With the stops it takes {b} + {c} = {b+c} hours.",
        "b+c",
    ),
    (
        "{who} found {b} {what}, and {friend} found {c} times as many. How many did they find together?",
        "{friend} found {b} * {c} = {b*c} {what}. Together they found {b} + {b*c} = {b+b*c}.",
        "b+b*c",
    ),
    (
        "The {what} cost {c} dollars each. {who} buys {b} and pays with {a+b*c} dollars. What comes back?",
        "The price is {b} * {c} = {b*c} dollars. Back come {a+b*c} - {b*c} = {a} dollars.",
        "a",
    ),
    (
        "{who} is {a} years old and {friend} is {b+c} years younger. How old is {friend} in {c} years?",
        "Now {friend} is {a} - {b+c} = {a-b-c}. In {c} years that is {a-b-c} + {c} = {a-b}.",
        "a-b",
    ),
)


def _problem(rng: random.Random) -> str:
    who, friend = rng.sample(_PEOPLE.split(), 2)
    a, b, c = (
        rng.randint(25, 99),
        rng.randint(2, 12),
        rng.randint(2, 11),
    )  # a > b + c: nothing goes below zero
    words = {"who": who, "friend": friend, "what": rng.choice(_THINGS.split()), "a": a, "b": b, "c": c}
    sums = {"b*c": b * c, "b+c": b + c, "a*b": a * b, "a-b": a - b, "a-c": a - c, "b+b*c": b + b * c}
    sums |= {"a+b*c": a + b * c, "a-b-c": a - b - c, "a*b-c": a * b - c}
    sums |= {"(a-c)*b": (a - c) * b, "(b+c)*a": (b + c) * a}
    question, working, result = rng.choice(_PROBLEMS)
    template = f"Question: {question}\nAnswer: {working} The answer is {{{result}}}.\n"
    return template.format_map(words | sums)
