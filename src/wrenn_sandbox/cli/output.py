"""What commands print: tables for people, JSON for programs."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec
import typer


def print_json(value: object) -> None:
    """One line of JSON; structs as objects, times as RFC 3339."""
    typer.echo(msgspec.json.encode(value))


def show(found: Sequence[object], columns: Mapping[str, str], *, json: bool) -> None:
    """Print what was found as JSON, or as a table whose heads stand for these fields of it."""
    if json:
        print_json(found)
        return
    rows = [[cell(name, getattr(each, name)) for name in columns.values()] for each in found]
    print_table(list(columns), rows)


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
    if isinstance(value, int) and name in ("size", "size_bytes"):
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
