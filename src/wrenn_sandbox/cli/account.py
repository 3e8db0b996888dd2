"""Which server commands call, and as whom: the environment first, then what `wrenn login` kept."""

import contextlib
import json
import os
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wrenn_sandbox.client import Client, ClientError
from wrenn_sandbox.client.transport import ANSWER_TIMEOUT_SEC
from wrenn_sandbox.settings import ClientSettings

DEFAULT_URL = "http://127.0.0.1:8080"


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
        raise ClientError(f"{file} can not be read ({error}): run wrenn login") from error
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
        raise ClientError(f"{file} can not be written: {error.strerror}") from error


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
        raise ClientError(f"there is no key for {who.url}: run wrenn login, or set WRENN_API_KEY")
    usual = ANSWER_TIMEOUT_SEC
    wait = usual if timeout is None else min(timeout, usual)
    return Client(who.url, api_key=who.api_key, timeout=wait)
