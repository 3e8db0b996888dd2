"""`wrenn admin drain`: empty the server on this machine before it is serviced."""

import asyncio
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from wrenn_sandbox.cli.output import printable, say, when
from wrenn_sandbox.control.clock import utc_now

from .access import administer

if TYPE_CHECKING:
    from wrenn_sandbox.control.store.administration import Administration
    from wrenn_sandbox.control.store.overview import SandboxRow

_LOOK_SECONDS = 1.0


class _Status(msgspec.Struct):
    draining_since: datetime | None
    busy: list["SandboxRow"]


def command(
    off: Annotated[bool, typer.Option("--off", help="Stop draining.")] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Only say what runs; change nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until nothing runs.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SEC", help="How long to wait at most; exit code 1 then.", min=0),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")] = False,
) -> None:
    """Take nothing new and pause what runs, one sandbox after the other."""
    if (off and (status or wait)) or (status and wait) or (timeout is not None and not wait):
        raise typer.BadParameter("--off, --status and --wait exclude each other; --timeout waits")

    async def work(admin: "Administration") -> _Status:
        if not status:
            await admin.drain(not off, utc_now())
        if wait:
            await _empty(admin, timeout, quiet=json)
        return _Status(await admin.draining_since(), await admin.busy())

    found = administer(work)
    since = found.draining_since
    say(
        found,
        "not draining" if since is None else f"draining since {when(since)}",
        _count(found.busy),
        *_lines(found.busy),
        json=json,
    )
    raise typer.Exit(1 if wait and found.busy else 0)


async def _empty(admin: "Administration", timeout: float | None, *, quiet: bool) -> None:
    """Wait until nothing runs, telling whenever that has changed, or until the time is over."""
    deadline = None if timeout is None else time.monotonic() + timeout
    told: list[str] | None = None
    while busy := await admin.busy():
        lines = _lines(busy)
        if lines != told and not quiet:
            typer.echo("\n".join([_count(busy), *lines]))
            told = lines
        if deadline is not None and time.monotonic() >= deadline:
            return
        await asyncio.sleep(_LOOK_SECONDS)


def _count(busy: list["SandboxRow"]) -> str:
    return f"{len(busy) or 'no'} sandbox{'' if len(busy) == 1 else 'es'} running"


def _lines(busy: list["SandboxRow"]) -> list[str]:
    """Each with the reason why it could not be paused, where there is one."""
    return [
        f"  {each.id}  {each.team_id}  {each.state}  {printable(each.reason or '')}".rstrip()
        for each in busy
    ]
