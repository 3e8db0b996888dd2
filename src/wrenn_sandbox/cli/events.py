"""`wrenn events`: what happens to what the team has."""

from typing import Annotated

import typer

from wrenn_sandbox.client import TeamEvent

from .account import open_client
from .output import print_json, print_table, printable, when
from .sandbox.exec import own_failures


def command(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print what happens from now on, for ever.")
    ] = False,
    after: Annotated[
        str | None,
        typer.Option(help="With --follow: begin behind the event of this id.", metavar="ID"),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many of the last ones.", min=1, max=1000)] = 50,
    json: Annotated[bool, typer.Option("--json", help="JSON, for programs.")] = False,
) -> None:
    """What happened to sandboxes, snapshots and API keys, newest first; or what happens now."""
    if after is not None and not follow:
        raise typer.BadParameter("--after needs --follow")
    if not follow:
        with open_client() as client:
            found = client.events.list(limit)
        if json:
            print_json(found)
        else:
            print_table(("ID", "WHEN", "WHAT", "ON", "WHY"), [_row(each) for each in found])
        return
    with own_failures(), open_client() as client:
        for event in client.events.follow(after):
            if json:
                print_json(event)
            else:
                typer.echo("  ".join(map(printable, _row(event))).rstrip())


def _row(event: TeamEvent) -> tuple[str, ...]:
    data = event.data
    on = data.get("sandbox_id") if event.type.startswith("sandbox.") else data.get("name")
    return event.id, when(event.time), event.type, on or "", data.get("reason", "")
