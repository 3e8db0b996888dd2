"""`wrenn webhook`: where events are delivered to."""

from typing import Annotated

import typer

from . import output
from .account import open_client
from .output import printable, say, when

app = typer.Typer(help="Have events delivered to a URL.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The webhook's id.")]
Events = Annotated[
    list[str] | None,
    typer.Option(
        "--event", "-e", metavar="TYPE", help="A type, sandbox.* and the like; may be repeated."
    ),
]
Description = Annotated[str | None, typer.Option(help="What it is for.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")]


@app.command("create")
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to, http or https.")],
    event: Events = None,
    description: Description = None,
    json: Json = False,
) -> None:
    """Have events delivered, and print the webhook's id and its secret, which is not shown again.

    Without --event all of them are.
    """
    with open_client() as client:
        made = client.webhooks.create(url, events=event or None, description=description)
    say(made, made.id, made.secret or "", json=json)


@app.command("list")
def show(json: Json = False) -> None:
    """List the team's webhooks, newest first."""
    with open_client() as client:
        found = client.webhooks.list()
    output.show(found, "id enabled url events failing_since created_at", json=json)


@app.command("get")
def get(id: Id, json: Json = False) -> None:
    """Show all there is to know of one webhook."""
    with open_client() as client:
        found = client.webhooks.get(id)
    rows = (
        ("id", found.id),
        ("url", found.url),
        ("events", ", ".join(found.events)),
        ("description", found.description),
        ("enabled", "yes" if found.enabled else "no"),
        ("reason", found.disabled_reason or ""),
        ("failing", when(found.failing_since)),
        ("next attempt", when(found.next_attempt_at)),
        ("created", when(found.created_at)),
    )
    lines = (f"{name:<12} {printable(value)}" for name, value in rows if value)
    say(found, *lines, json=json)


@app.command("update")
def update(
    id: Id,
    url: Annotated[str | None, typer.Option(help="Another URL.")] = None,
    event: Events = None,
    description: Description = None,
    enabled: Annotated[
        bool | None,
        typer.Option("--enable/--disable", help="Deliver on from where it stopped, or stop."),
    ] = None,
    json: Json = False,
) -> None:
    """Change what is given. What failed last is tried again at once."""
    with open_client() as client:
        changed = client.webhooks.update(
            id, url=url, events=event or None, description=description, enabled=enabled
        )
    say(changed, f"{changed.id} {'enabled' if changed.enabled else 'disabled'}", json=json)


@app.command("delete")
def delete(id: Id) -> None:
    """Deliver nothing more."""
    with open_client() as client:
        client.webhooks.delete(id)


@app.command("deliveries")
def deliveries(id: Id, json: Json = False) -> None:
    """The last attempts to deliver, newest first."""
    with open_client() as client:
        found = client.webhooks.deliveries(id)
    output.show(found, "time event_id type attempt outcome status error", json=json)


@app.command("test")
def deliver(id: Id, json: Json = False) -> None:
    """Deliver an event of the type webhook.test now; exit code 1 when that failed."""
    with open_client() as client:
        told = client.webhooks.test(id)
    say(told, f"{told.outcome}: {told.error or f'status {told.status}'}", json=json)
    if told.outcome != "delivered":
        raise typer.Exit(1)
