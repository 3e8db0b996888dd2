"""Every error message has one form: a capital, no full stop at its end, "cannot" as one word.

Callers and operators read these messages one below the other.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_SOURCES = Path(__file__).parents[2] / "src" / "wrenn_sandbox"
_MODULES = [path for path in sorted(_SOURCES.rglob("*.py")) if "client" not in path.parts]
_TREES = {path: ast.parse(path.read_text()) for path in _MODULES}
_FIELDS = re.compile(
    r"[a-zA-Z_]+([.]|: |, [a-z_]+ and [a-z_]+ must )|(cmd|email|name|password) must "
)
"""A message that begins with a field of the request, as the caller wrote it."""


def _error_classes() -> set[str]:
    names = {"WrennError"}
    while True:
        found = {
            node.name
            for tree in _TREES.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            and any(isinstance(base, ast.Name) and base.id in names for base in node.bases)
        }
        if found <= names:
            return names
        names |= found


def _texts(node: ast.expr | None, constants: dict[str, ast.expr]) -> Iterator[str]:
    """What a message can be, with `{}` for what is put into it."""
    if isinstance(node, ast.Name):
        node = constants.get(node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = (each.value if isinstance(each, ast.Constant) else "{}" for each in node.values)
        yield "".join(map(str, parts))
    elif isinstance(node, ast.BinOp):
        for left in _texts(node.left, constants):
            yield left + "{}"
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, constants)
        yield from _texts(node.orelse, constants)


def _messages(tree: ast.Module, errors: set[str]) -> Iterator[str]:
    constants = {
        node.target.id: node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in errors
            and node.args
        ):
            yield from _texts(node.args[0], constants)


def _fault(message: str) -> str | None:
    if message.endswith(".") and not message.endswith("..."):
        return "ends with a full stop"
    if re.search(r"\b[Cc](an not|an't)\b", message):
        return "does not say cannot"
    if message[:1].islower() and not _FIELDS.match(message):
        return "begins in lower case"
    return None


def test_every_error_message_has_the_same_form() -> None:
    errors = _error_classes()
    found = [message for tree in _TREES.values() for message in _messages(tree, errors)]
    assert len(found) > 200
    assert [(each, fault) for each in found if (fault := _fault(each))] == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('raise NotFound("There is nothing.")', "ends with a full stop"),
        ('raise NotFound(f"{name} is nothing.")', "ends with a full stop"),
        ('raise NotFound("nothing is there")', "begins in lower case"),
        ('raise NotFound("It can not be")', "does not say cannot"),
        ('_GONE: Final = "gone."\nraise NotFound(_GONE)', "ends with a full stop"),
        ('raise NotFound("name: there is none")', None),
        ('raise NotFound("There is nothing")', None),
    ],
)
def test_a_message_of_another_form_is_found(source: str, fault: str | None) -> None:
    (message,) = _messages(ast.parse(source), {"NotFound"})
    assert _fault(message) == fault
