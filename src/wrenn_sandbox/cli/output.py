"""What commands print: tables for people, JSON for programs."""

from collections.abc import Sequence
from datetime import datetime

import msgspec
import typer


def print_json(value: object) -> None:
    """One line of JSON; structs as objects, times as RFC 3339."""
    typer.echo(msgspec.json.encode(value))


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
