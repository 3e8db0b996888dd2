"""`wrenn secret`: values that hosts put into requests of sandboxes."""

import sys
from typing import Annotated

import typer

from . import output
from .account import open_client
from .output import say

app = typer.Typer(help="Keep secrets that no sandbox sees.", no_args_is_help=True)

_LONGEST = 64 * 1024
Name = Annotated[str, typer.Argument(metavar="NAME", help="The secret's name.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")]


@app.command("create")
def create(name: Name, json: Json = False) -> None:
    """Keep a value, read from standard input. Network policies refer to it by its name."""
    value = _value()
    with open_client() as client:
        made = client.secrets.create(name, value)
    say(made, made.name, json=json)


@app.command("replace")
def replace(name: Name, json: Json = False) -> None:
    """Give a secret another value, read from standard input; running sandboxes use it at once."""
    value = _value()
    with open_client() as client:
        changed = client.secrets.replace(name, value)
    say(changed, changed.name, json=json)


@app.command("list")
def show(json: Json = False) -> None:
    """List the team's secrets without their values, newest first."""
    with open_client() as client:
        found = client.secrets.list()
    output.show(found, "name created_at updated_at", json=json)


@app.command("delete")
def delete(name: Name) -> None:
    """Forget a secret. Refused while the network policy of a sandbox refers to it."""
    with open_client() as client:
        client.secrets.delete(name)


def _value() -> str:
    """What was typed or piped in, without the end of its line."""
    if sys.stdin.isatty():
        return str(typer.prompt("Value", hide_input=True))
    return sys.stdin.read(_LONGEST).removesuffix("\n").removesuffix("\r")
