"""No public signature, field or type alias of the packages below is typed `Any`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsekd_ray

ROOT = Path(sparsekd_ray.__file__).parent
PACKAGES = ("model", "prune", "teacher", "distill")
EXCEPTIONS = {
    # This file runs under transformers 4 and 5, and makes classes of stock classes that are known only at run time.
    "model/low_rank.py",
}
FILES = [
    path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.relative_to(ROOT).as_posix() not in EXCEPTIONS
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_names_are_not_typed_any(path: Path) -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{annotation.lineno} {name}"
        for name, annotation in public_annotations(ast.parse(path.read_text()).body)
        if mentions_any(annotation)
    ]
    assert not offenders


@pytest.mark.parametrize("name", sorted(EXCEPTIONS))
def test_every_exception_is_still_needed(name: str) -> None:
    annotations = public_annotations(ast.parse((ROOT / name).read_text()).body)
    assert any(mentions_any(annotation) for _, annotation in annotations)


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: Any): ...",
        "def f(*, x: dict[str, Any]): ...",
        "def f(*args: Any): ...",
        "def f(**options: typing.Any): ...",
        "def f() -> 'list[Any]': ...",
        "async def f() -> Any: ...",
        "class A:\n    x: Any",
        "class A:\n    def __init__(self, x: Any): ...",
        "class A:\n    def f(self) -> Any | None: ...",
        "Row = dict[str, Any]",
        "limit: Any = 3",
    ],
)
def test_any_is_found_wherever_it_stands(source: str) -> None:
    assert [
        name for name, annotation in public_annotations(ast.parse(source).body) if mentions_any(annotation)
    ]


@pytest.mark.parametrize(
    "source",
    [
        "def _f(x: Any): ...",
        "class _A:\n    x: Any",
        "class A:\n    def _f(self) -> Any: ...",
        "def f(x: int) -> None:\n    y: Any = x",
        "Row = dict[str, object]",
        "ADVICE = 'Any of them will do'",
    ],
)
def test_private_names_and_bodies_may_use_any(source: str) -> None:
    annotations = public_annotations(ast.parse(source).body)
    assert not [name for name, annotation in annotations if mentions_any(annotation)]


def public_annotations(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.expr]]:
    """Name and annotation of every public parameter, result, field and type alias of a module or class."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if is_public(node.name):
                for annotation in signature(node):
                    yield prefix + node.name, annotation
            case ast.ClassDef() if is_public(node.name):
                yield from public_annotations(node.body, f"{prefix}{node.name}.")
            case ast.AnnAssign(target=ast.Name(id=name)) if is_public(name):
                yield prefix + name, node.annotation
            case ast.Assign(targets=[ast.Name(id=name)]) if is_public(name):
                yield prefix + name, node.value
            case ast.If():
                yield from public_annotations([*node.body, *node.orelse], prefix)


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    annotations = [*(argument.annotation for argument in named + starred), function.returns]
    return [annotation for annotation in annotations if annotation is not None]


def mentions_any(annotation: ast.AST) -> bool:
    """Whether `Any` occurs in an annotation, or in a string that parses as one."""
    for node in ast.walk(annotation):
        match node:
            case ast.Name(id="Any") | ast.Attribute(attr="Any"):
                return True
            case ast.Constant(value=str(text)):
                try:
                    quoted = ast.parse(text, mode="eval")
                except (SyntaxError, ValueError):  # prose
                    continue
                if mentions_any(quoted):
                    return True
    return False
