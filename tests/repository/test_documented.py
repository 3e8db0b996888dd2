"""The documents are complete and say what works."""

import re
from pathlib import Path

import typer.main
from typer.core import TyperGroup

from wrenn_sandbox.cli.main import app

_ROOT = Path(__file__).parents[2]


def _commands(command: object, path: str) -> list[str]:
    if not isinstance(command, TyperGroup):
        return [path]
    inner = [
        each for name, sub in command.commands.items() for each in _commands(sub, f"{path} {name}")
    ]
    return inner if path != "wrenn" else [path, *inner]


def test_every_command_has_its_section() -> None:
    sections = re.findall(r"^## (.+)$", (_ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(_commands(typer.main.get_command(app), "wrenn"))
