"""`wrenn login`: from an email and a password to a key that the other commands use."""

import platform
import sys
from typing import Annotated

import typer

from wrenn_sandbox.client import Client
from wrenn_sandbox.settings import ClientSettings

from .account import Account, caller, keep


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
    key = _checked_key(server) if with_key else _new_key(server, email, signup)
    keep(settings.config_file, Account(server, key))
    typer.echo(f"logged in to {server}; the key is in {settings.config_file}")


def _checked_key(server: str) -> str:
    key = _secret("API key")
    with Client(server, api_key=key) as client:
        client.snapshots.list()
    return key


def _new_key(server: str, email: str | None, signup: bool) -> str:
    with Client(server) as client:
        email = email or typer.prompt("Email", err=True)
        password = _secret("Password")
        enter = client.signup if signup else client.login
        enter(email, password)
        key = client.api_keys.create(f"wrenn login on {platform.node()}").key
    assert key is not None
    return key


def _secret(what: str) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    return str(typer.prompt(what, hide_input=True, err=True))
