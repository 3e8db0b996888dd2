"""`wrenn login`: from an email and a password to a key that the other commands use."""

import platform
import sys
from typing import Annotated

import msgspec
import typer

from wrenn_sandbox.client import Client
from wrenn_sandbox.settings import ClientSettings

from .account import Account, caller, keep, kept, open_client
from .output import print_json


def command(
    url: Annotated[str | None, typer.Option(help="The server (WRENN_URL).")] = None,
    email: Annotated[str | None, typer.Option(help="Without, it is asked for.")] = None,
    signup: Annotated[bool, typer.Option("--signup", help="Make the account first.")] = False,
    with_key: Annotated[
        bool, typer.Option("--with-key", help="Ask for an API key instead of a password.")
    ] = False,
) -> None:
    """Log in to a server, make an API key and keep it for the other commands.

    The password or key is asked for; without a terminal it is the first line of standard input.
    """
    settings = ClientSettings()
    server = url or caller(settings).url
    account = _checked_key(server) if with_key else _new_key(server, email, signup)
    keep(settings.config_file, account)
    typer.echo(f"logged in to {server}; the key is in {settings.config_file}")


def logout() -> None:
    """Forget the key that `wrenn login` kept. The key itself goes on counting."""
    file = ClientSettings().config_file
    account = kept(file)
    if account is None:
        typer.echo("nobody is logged in")
        return
    file.unlink(missing_ok=True)
    typer.echo(f"logged out of {account.url}; {_beginning(account.api_key)} is no longer kept here")


class _Who(msgspec.Struct):
    url: str
    email: str | None
    key_prefix: str
    source: str


def whoami(
    json: Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")] = False,
) -> None:
    """Which server commands call, and as whom; fails when the server does not take the key."""
    settings = ClientSettings()
    given = settings.api_key is not None
    with open_client() as client:
        client.usage()
    account = caller(settings)
    assert account.api_key is not None
    who = _Who(
        url=account.url,
        email=account.email or None,
        key_prefix=_beginning(account.api_key),
        source="WRENN_API_KEY" if given else str(settings.config_file),
    )
    if json:
        print_json(who)
        return
    typer.echo(f"{who.email or 'somebody'} at {who.url}")
    typer.echo(f"key {who.key_prefix} of {who.source}")


def _beginning(key: str) -> str:
    """What lists of keys show of one."""
    return f"{key[:12]}..."


def _checked_key(server: str) -> Account:
    key = _secret("API key")
    with Client(server, api_key=key) as client:
        client.usage()
    return Account(server, key)


def _new_key(server: str, email: str | None, signup: bool) -> Account:
    with Client(server) as client:
        email = email or typer.prompt("Email", err=True)
        password = _secret("Password")
        enter = client.signup if signup else client.login
        enter(email, password)
        key = client.api_keys.create(f"wrenn login on {platform.node()}").key
    assert key is not None
    return Account(server, key, email)


def _secret(what: str) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    return str(typer.prompt(what, hide_input=True, err=True))
