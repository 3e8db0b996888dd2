"""`wrenn sandbox shell`: this terminal becomes one of the sandbox's."""

import sys
from typing import Annotated

import typer

from wrenn_sandbox.cli.account import open_client
from wrenn_sandbox.cli.pump import InputPump, raw_mode, size_of, write_all
from wrenn_sandbox.client import ClientError, Sandbox, Terminal
from wrenn_sandbox.settings import ClientSettings

from .exec import FAILED, command_of, own_failures


def command(
    id: Annotated[str, typer.Argument(metavar="ID", help="The sandbox's id.")],
    argv: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CMD [ARG...]]", help="What to run; a login shell."),
    ] = None,
    cwd: Annotated[str | None, typer.Option(help="Directory to start in; /root.")] = None,
    user: Annotated[str | None, typer.Option(help="User to be; root.")] = None,
    connect: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="Come back to a terminal whose connection was lost."),
    ] = None,
) -> None:
    """Open a terminal in a sandbox. Exits with the shell's exit code; options come before the id.

    125: it could not be opened, or the connection was lost.
    """
    argv = command_of(argv or [])
    with own_failures():
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ClientError("shell needs a terminal; without one use wrenn sandbox exec")
        with open_client() as client:
            code = _run(client.sandboxes.get(id), argv, cwd, user, connect)
    raise typer.Exit(code)


def _run(
    sandbox: Sandbox, argv: list[str], cwd: str | None, user: str | None, tag: str | None
) -> int:
    screen = sys.stdin.fileno()
    opening = (
        sandbox.pty_connect(tag)
        if tag is not None
        else sandbox.pty(
            *argv,
            size=size_of(screen),
            envs={"TERM": ClientSettings().terminal},
            cwd=cwd,
            user=user,
        )
    )
    with opening as terminal:
        try:
            with raw_mode(screen):
                return _talk(terminal, screen)
        except ClientError:
            way_back = f"wrenn sandbox shell --connect {terminal.tag} {sandbox.id}"
            typer.echo(
                f"wrenn: while the sandbox is there, so is this terminal: {way_back}", err=True
            )
            raise


def _talk(terminal: Terminal, screen: int) -> int:
    def resize() -> None:
        size = size_of(screen)
        terminal.resize(size.cols, size.rows)

    with InputPump(screen, terminal.send, on_resize=resize):
        for shown in terminal:
            write_all(sys.stdout.fileno(), shown)
    return FAILED if terminal.exit_code is None else terminal.exit_code
