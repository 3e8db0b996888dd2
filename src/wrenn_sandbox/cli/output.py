"""What commands print: tables for people, JSON for programs."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Final

import msgspec
import typer

_BYTES: Final = {
    *("size", "size_bytes", "disk_used", "disk_total"),
    *("mem_used", "mem_total", "mem_cache"),
}
"""Fields that people read in MB."""

_HEADS: Final = {
    "action": "what",
    "actor": "by",
    "at": "when",
    "operator": "who",
    "size": "stored",
    "subject": "on",
}
"""Heads of columns that are not called like their fields."""


IdempotencyKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Repeat the same command with it, and it is done once."),
]


def print_json(value: object) -> None:
    """One line of JSON; structs as objects, times as RFC 3339."""
    typer.echo(msgspec.json.encode(value))


def say(value: object, *lines: str, json: bool) -> None:
    """Print `value` as JSON, or in its place these lines."""
    if json:
        print_json(value)
        return
    for line in lines:
        typer.echo(line)


def show(found: Sequence[object], fields: str, *, json: bool) -> None:
    """Print what was found as JSON, or these fields of it (with spaces between) as a table."""
    if json:
        print_json(found)
        return
    names = fields.split()
    rows = [[cell(name, getattr(each, name)) for name in names] for each in found]
    print_table([_head(name) for name in names], rows)


def _head(field: str) -> str:
    name = _HEADS.get(field) or re.sub("_(id|at|mb|bytes|prefix|state)$", "", field)
    return name.replace("_", " ").upper()


def cell(name: str, value: object) -> str:
    """A field as people read it; its name says in which unit it is."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return when(value)
    if isinstance(value, list | tuple):
        return ", ".join(value)
    if name.endswith("_mb"):
        return f"{value} MB"
    if isinstance(value, int) and name.removeprefix("net_") in ("received", "sent"):
        return f"{value >> 10} KB"
    if isinstance(value, int) and name in _BYTES:
        return f"{value >> 20} MB"
    return str(value)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, two spaces between them."""
    table = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (printable(cell).ljust(w) for cell, w in zip(cells, widths, strict=True))
        typer.echo("  ".join(padded).rstrip())


def printable(text: str) -> str:
    """Without characters that would move the cursor of a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def when(time: datetime | None) -> str:
    """A time as people read it, in the zone of this machine."""
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
