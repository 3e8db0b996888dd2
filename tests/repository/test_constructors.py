"""No constructor takes more than a reader can hold: what belongs together comes as one thing."""

import ast
from collections.abc import Iterator
from pathlib import Path

_SOURCES = Path(__file__).parents[2] / "src"
_MOST = 8
"""Parameters, `self` aside. Dataclasses and structs are data: they have no `__init__` of theirs."""


def _constructors(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """`__init__` and the class methods of classes, and functions `create_...`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and (
                    each.name == "__init__"
                    or any(ast.unparse(mark) == "classmethod" for mark in each.decorator_list)
                ):
                    yield f"{node.name}.{each.name}", each
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("create_"):
            yield node.name, node


def _too_long(source: str) -> dict[str, int]:
    found = {}
    for name, function in _constructors(ast.parse(source)):
        given = function.args
        count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
        count -= "." in name  # self or cls
        if count > _MOST:
            found[name] = count
    return found


def test_no_constructor_has_more_than_eight_parameters() -> None:
    found = {
        f"{path.relative_to(_SOURCES)}: {name}": count
        for path in sorted(_SOURCES.rglob("*.py"))
        for name, count in _too_long(path.read_text()).items()
    }
    assert not found


def test_the_ninth_parameter_is_seen() -> None:
    eight = "class A:\n    def __init__(self, a, b, c, d, e, f, g, *, h): ...\n"
    assert _too_long(eight) == {}
    assert _too_long(eight.replace("*, h", "*, h, i")) == {"A.__init__": 9}
    assert _too_long("def create_app(a, b, c, d, e, f, g, h, i): ...") == {"create_app": 9}
