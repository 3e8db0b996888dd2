"""`wrenn admin create-user` and `set-password`: accounts by the operator's hand."""

import asyncio
import sys
from typing import Annotated

import typer

from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.ids import new_team_id, new_user_id

from .access import administer

FromStdin = Annotated[
    bool,
    typer.Option("--password-stdin", help="The password is the first line of standard input."),
]


def create_user(
    email: Annotated[str, typer.Argument(metavar="EMAIL", help="What the user logs in with.")],
    password_stdin: FromStdin = False,
) -> None:
    """Make a user with a team of their own, also where sign-up is closed."""
    from wrenn_sandbox.control.service.accounts import normal_email
    from wrenn_sandbox.control.store.records import Account

    email = normal_email(email)
    account = Account(new_user_id(), new_team_id(), email, _hash_of_new_password(password_stdin))
    administer(lambda admin: admin.create_user(account, utc_now()))
    typer.echo(f"{email} is {account.user_id} with {account.team_id}")


def set_password(
    user: Annotated[str, typer.Argument(metavar="USER", help="Email or id of a user.")],
    password_stdin: FromStdin = False,
) -> None:
    """Give a user another password, and log them out everywhere."""
    user_id = administer(lambda admin: admin.user(user))
    hashed = _hash_of_new_password(password_stdin)
    administer(lambda admin: admin.set_password(user_id, hashed, utc_now()))
    typer.echo(f"{user} has another password; tokens from before do not count any more")


def _hash_of_new_password(from_stdin: bool) -> str:
    """Never from the command line, which every process of this machine can read."""
    from wrenn_sandbox.control.service.passwords import Passwords, check_password

    try:
        password = _password(from_stdin)
        password.encode("utf-8")
    except UnicodeError as error:
        raise InvalidRequest("password must be UTF-8") from error
    check_password(password)
    return asyncio.run(Passwords().hash(password))


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise InvalidRequest("There is no terminal to ask for a password; use --password-stdin")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
