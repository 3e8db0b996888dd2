"""`wrenn admin`: the users, teams, keys and sandboxes of the server on this machine."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from wrenn_sandbox.cli.output import printable, show
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.sandbox import State

from . import accounts, drain, quota

if TYPE_CHECKING:
    from wrenn_sandbox.control.store.administration import Administration
    from wrenn_sandbox.control.store.overview import KeyRow

app = typer.Typer(
    help="Look after the users, keys and sandboxes of the server on this machine.",
    no_args_is_help=True,
)
app.command("drain")(drain.command)
app.command("set-quota")(quota.command)
app.command("create-user")(accounts.create_user)
app.command("set-password")(accounts.set_password)

Json = Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")]
User = Annotated[str, typer.Argument(metavar="USER", help="Email or id of a user.")]
Team = Annotated[str, typer.Argument(metavar="TEAM", help="Id of a team.")]
OfTeam = Annotated[str | None, typer.Option("--team", metavar="TEAM", help="Of this team only.")]

# What reaches the database takes a moment to import, and `wrenn --help` does without.


@app.command("users")
def users(json: Json = False) -> None:
    """List all users: team, state, how they log in."""
    from .access import administer

    columns = {
        "EMAIL": "email",
        "ID": "id",
        "TEAM": "team_id",
        "CREATED": "created_at",
        "DISABLED": "disabled_at",
        "LOGIN": "login",
    }
    show(administer(lambda admin: admin.users()), columns, json=json)


@app.command("teams")
def teams(json: Json = False) -> None:
    """List all teams with what they have."""
    from .access import administer

    columns = {
        "ID": "id",
        "NAME": "name",
        "MEMBERS": "members",
        "KEYS": "keys",
        "RUNNING": "running",
        "PAUSED": "paused",
        "QUOTA": "quota",
        "CREATED": "created_at",
    }
    show(administer(lambda admin: admin.teams()), columns, json=json)


@app.command("keys")
def keys(team: OfTeam = None, json: Json = False) -> None:
    """List API keys by their beginnings; the keys themselves are not kept anywhere."""
    from .access import administer

    found = administer(lambda admin: admin.keys(None if team is None else TeamId(team)))
    columns = {
        "ID": "id",
        "KEY": "key_prefix",
        "NAME": "name",
        "TEAM": "team_id",
        "CREATED": "created_at",
        "LAST USED": "last_used",
    }
    show(found, columns, json=json)


@app.command("sandboxes")
def sandboxes(
    state: Annotated[
        list[State] | None, typer.Option("--state", "-s", help="In this state; may be repeated.")
    ] = None,
    team: OfTeam = None,
    all: Annotated[bool, typer.Option("--all", "-a", help="Ended ones too.")] = False,
    json: Json = False,
) -> None:
    """List the sandboxes of all teams, newest first."""
    from .access import administer

    ended = (State.STOPPED, State.ERROR)
    states = state or [each for each in State if all or each not in ended]
    found = administer(
        lambda admin: admin.sandboxes(states, None if team is None else TeamId(team))
    )
    columns = {
        "ID": "id",
        "STATE": "state",
        "TEAM": "team_id",
        "TEMPLATE": "template",
        "VCPUS": "vcpus",
        "MEMORY": "memory_mb",
        "CREATED": "created_at",
        "REASON": "reason",
    }
    show(found, columns, json=json)


@app.command("log")
def log(
    limit: Annotated[int, typer.Option(help="How many, at most.", min=1)] = 100,
    json: Json = False,
) -> None:
    """Show what was done with these commands, newest first."""
    from .access import administer

    columns = {"WHEN": "at", "WHO": "operator", "WHAT": "action", "ON": "subject"}
    show(administer(lambda admin: admin.actions(limit)), columns, json=json)


@app.command("disable-user")
def disable_user(user: User) -> None:
    """Shut a user out at once; a server pauses what then runs for nobody."""
    from .access import administer, now

    async def work(admin: "Administration") -> None:
        await admin.disable(await admin.user(user), now())

    administer(work)
    typer.echo(f"{user} is disabled")


@app.command("enable-user")
def enable_user(user: User) -> None:
    """Let a disabled user log in again."""
    from .access import administer, now

    async def work(admin: "Administration") -> None:
        await admin.enable(await admin.user(user), now())

    administer(work)
    typer.echo(f"{user} is enabled")


@app.command("revoke-tokens")
def revoke_tokens(
    user: Annotated[
        str | None, typer.Argument(metavar="USER", help="Email or id of a user.")
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Of every user.")] = False,
) -> None:
    """Log a user out everywhere, or with --all everyone."""
    from .access import administer, now

    if all is (user is not None):
        raise typer.BadParameter("give a user, or --all")

    async def work(admin: "Administration") -> int:
        return await admin.revoke_tokens(None if user is None else await admin.user(user), now())

    number = administer(work)
    typer.echo(f"the tokens of {user or f'{number} users'} do not count any more")


@app.command("revoke-key")
def revoke_key(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="Id, first twelve characters, or the key itself; - reads it from standard input.",
        ),
    ],
) -> None:
    """Make an API key useless at once."""
    from .access import administer, now

    which = (sys.stdin.readline() if key == "-" else key).strip()

    async def work(admin: "Administration") -> "KeyRow":
        found = await admin.find_key(which)
        await admin.revoke_key(found.id, now())
        return found

    gone = administer(work)
    typer.echo(f"{gone.id} ({gone.key_prefix} {printable(gone.name)}) of {gone.team_id} is revoked")


@app.command("revoke-keys")
def revoke_keys(team: Team) -> None:
    """Make all API keys of a team useless at once."""
    from .access import administer, now

    async def work(admin: "Administration") -> int:
        return await admin.revoke_keys(await admin.team(team), now())

    typer.echo(f"{administer(work)} keys of {team} are revoked")
