"""`wrenn usage`: what the team may have and has, and what it has used by day."""

from datetime import date, datetime
from typing import Annotated

import typer

from wrenn_sandbox.client import DayUsage

from .account import open_client
from .output import print_json, print_table

_FORMATS = ["%Y-%m-%d"]


def command(
    by_day: Annotated[
        bool, typer.Option("--by-day", help="What ran on each day (UTC) of the last 30.")
    ] = False,
    first: Annotated[
        datetime | None, typer.Option("--from", formats=_FORMATS, help="The same from this day on.")
    ] = None,
    last: Annotated[
        datetime | None, typer.Option("--to", formats=_FORMATS, help="The same up to this day.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")] = False,
) -> None:
    """What the team has and may have; or how long its sandboxes ran, deleted ones too."""
    if by_day or first or last:
        _show_days(_day(first), _day(last), json)
        return
    with open_client() as client:
        usage = client.usage()
    if json:
        print_json(usage)
        return
    names = usage.used.__struct_fields__
    rows = [(each, getattr(usage.used, each), getattr(usage.limits, each)) for each in names]
    cells = [
        (name, str(used), "none" if limit is None else str(limit)) for name, used, limit in rows
    ]
    print_table(("WHAT", "USED", "LIMIT"), cells)


def _day(given: datetime | None) -> date | None:
    return None if given is None else given.date()


def _show_days(first: date | None, last: date | None, json: bool) -> None:
    with open_client() as client:
        history = client.usage_history(first, last)
    if json:
        print_json(history)
        return
    shown = [each for each in history.days if each.running_sec]
    print_table(("DAY", "HOURS", "VCPU HOURS", "GB HOURS"), [_row(each) for each in shown])


def _row(day: DayUsage) -> tuple[str, ...]:
    hours = (day.running_sec, day.vcpu_sec, day.memory_mb_sec / 1024)
    return (day.date.isoformat(), *(f"{each / 3600:.2f}" for each in hours))
