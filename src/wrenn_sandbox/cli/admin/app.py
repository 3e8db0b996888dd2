"""`wrenn admin`: the users, teams, keys and sandboxes of the server on this machine."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from wrenn_sandbox.cli.output import printable, show
from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.sandbox import State

from . import accounts, drain, quota
from .access import administer

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


@app.command("users")
def users(json: Json = False) -> None:
    """List all users: team, state, how they log in."""
    found = administer(lambda admin: admin.users())
    show(found, "email id team_id created_at disabled_at login", json=json)


@app.command("teams")
def teams(json: Json = False) -> None:
    """List all teams with what they have."""
    found = administer(lambda admin: admin.teams())
    show(found, "id name members keys running paused quota created_at", json=json)


@app.command("keys")
def keys(team: OfTeam = None, json: Json = False) -> None:
    """List API keys by their beginnings; the keys themselves are not kept anywhere."""
    found = administer(lambda admin: admin.keys(None if team is None else TeamId(team)))
    show(found, "id key_prefix name team_id created_at last_used", json=json)


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
    ended = (State.STOPPED, State.ERROR)
    states = state or [each for each in State if all or each not in ended]
    found = administer(
        lambda admin: admin.sandboxes(states, None if team is None else TeamId(team))
    )
    show(found, "id state team_id template vcpus memory_mb created_at reason", json=json)


@app.command("log")
def log(
    limit: Annotated[int, typer.Option(help="How many, at most.", min=1)] = 100,
    json: Json = False,
) -> None:
    """Show what was done with these commands, newest first."""
    show(administer(lambda admin: admin.actions(limit)), "at operator action subject", json=json)


@app.command("disable-user")
def disable_user(user: User) -> None:
    """Shut a user out at once; a server pauses what then runs for nobody."""

    async def work(admin: "Administration") -> None:
        await admin.disable(await admin.user(user), utc_now())

    administer(work)
    typer.echo(f"{user} is disabled")


@app.command("enable-user")
def enable_user(user: User) -> None:
    """Let a disabled user log in again."""

    async def work(admin: "Administration") -> None:
        await admin.enable(await admin.user(user), utc_now())

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
    if all is (user is not None):
        raise typer.BadParameter("give a user, or --all")

    async def work(admin: "Administration") -> int:
        return await admin.revoke_tokens(
            None if user is None else await admin.user(user), utc_now()
        )

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
    which = (sys.stdin.readline() if key == "-" else key).strip()

    async def work(admin: "Administration") -> "KeyRow":
        found = await admin.find_key(which)
        await admin.revoke_key(found.id, utc_now())
        return found

    gone = administer(work)
    typer.echo(f"{gone.id} ({gone.key_prefix} {printable(gone.name)}) of {gone.team_id} is revoked")


@app.command("revoke-keys")
def revoke_keys(team: Team) -> None:
    """Make all API keys of a team useless at once."""

    async def work(admin: "Administration") -> int:
        return await admin.revoke_keys(await admin.team(team), utc_now())

    typer.echo(f"{administer(work)} keys of {team} are revoked")
