"""Which server commands call, and as whom: the environment first, then what `wrenn login` kept."""

import contextlib
import json
import os
import platform
import shlex
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from wrenn_sandbox.client import Client, ClientError
from wrenn_sandbox.client.transport import ANSWER_TIMEOUT_SEC
from wrenn_sandbox.ids import e2b_key, plain_api_key
from wrenn_sandbox.settings import ClientSettings

from .output import say

DEFAULT_URL = "http://127.0.0.1:8080"
_NO_KEY = "there is no key for {}: run wrenn login, or set WRENN_API_KEY"


class Account(msgspec.Struct, frozen=True):
    """A server and a key for it; the email of who logged in to get it."""

    url: str
    api_key: str
    email: str = ""


def kept(file: Path) -> Account | None:
    """What `wrenn login` wrote to `file`; None when it did not. `ClientError`: it is damaged."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(f"{file} cannot be read ({error}): run wrenn login") from error
    try:
        return msgspec.convert(tomllib.loads(text), type=Account)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ClientError(f"{file} is not what wrenn login writes: run it again") from error


def keep(file: Path, account: Account) -> None:
    """Write `account` to `file`, which nobody else may read, in place of what was there."""
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in msgspec.structs.asdict(account).items()
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # mkstemp makes it 0600
        descriptor, name = tempfile.mkstemp(prefix=".config-", dir=file.parent)
        with contextlib.ExitStack() as undo:
            undo.callback(Path(name).unlink)
            with open(descriptor, "w") as made:
                made.writelines(lines)
                made.flush()
                os.fsync(made.fileno())
            Path(name).replace(file)
            undo.pop_all()
    except OSError as error:
        raise ClientError(f"{file} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Caller:
    """Whom a command calls, before it is known whether there is a key."""

    url: str
    api_key: str | None
    email: str = ""


def caller(settings: ClientSettings) -> Caller:
    """The server and the key to use. A kept key goes to no other server than its own."""
    account = kept(settings.config_file)
    url = settings.url or (account.url if account is not None else DEFAULT_URL)
    if settings.api_key is not None:
        return Caller(url, settings.api_key.get_secret_value())
    if account is not None and account.url.rstrip("/") == url.rstrip("/"):
        return Caller(url, account.api_key, account.email)
    return Caller(url, None)


def open_client(timeout: float | None = None) -> Client:
    """A client for what a command calls. `ClientError`: nobody has logged in.

    The server gets `timeout` seconds for an answer, where that is less than it usually gets.
    """
    who = caller(ClientSettings())
    if who.api_key is None:
        raise ClientError(_NO_KEY.format(who.url))
    usual = ANSWER_TIMEOUT_SEC
    wait = usual if timeout is None else min(timeout, usual)
    return Client(who.url, api_key=who.api_key, timeout=wait)


def login(
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
    say(
        who,
        f"{who.email or 'somebody'} at {who.url}",
        f"key {who.key_prefix} of {who.source}",
        json=json,
    )


def e2b() -> None:
    """Print what clients of E2B need to use this server, for a shell: eval "$(wrenn e2b)"."""
    who = caller(ClientSettings())
    if who.api_key is None:
        raise ClientError(_NO_KEY.format(who.url))
    key = plain_api_key(who.api_key)
    variables = {
        "E2B_API_URL": who.url,
        "E2B_SANDBOX_URL": who.url,
        "E2B_API_KEY": who.api_key if key is None else e2b_key(key),
    }
    for name, value in variables.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


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
