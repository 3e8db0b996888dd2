"""`wrenn process`: commands that run in the background of a sandbox."""

from typing import Annotated, Final, Literal

import typer

from wrenn_sandbox.cli.sandbox.exec import FAILED, command_of, environment_of, own_failures
from wrenn_sandbox.client import Exit, Stderr

from .account import open_client
from .output import print_json, print_table, say
from .pump import write_all

app = typer.Typer(help="Run commands in the background of a sandbox.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The sandbox's id.")]
Name = Annotated[str, typer.Argument(metavar="PROCESS", help="Its process id, or its tag.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on one line, for programs.")]

# From the id on, everything is the command's.
_COMMAND_LINE: Final = {"allow_interspersed_args": False}


@app.command("start", context_settings=_COMMAND_LINE)
def start(
    id: Id,
    argv: Annotated[
        list[str], typer.Argument(metavar="CMD [ARG...]", help="What to run, without a shell.")
    ],
    tag: Annotated[str | None, typer.Option(help="A name for it; one is made up.")] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="May be repeated.")
    ] = None,
    cwd: Annotated[str | None, typer.Option(help="Directory to run it in; /root.")] = None,
    user: Annotated[str | None, typer.Option(help="User to run it as; root.")] = None,
    json: Json = False,
) -> None:
    """Start a command, leave it running and print its tag; options come before the id."""
    argv = command_of(argv)
    envs = environment_of(env or [])
    with open_client() as client:
        processes = client.sandboxes.get(id).processes
        started = processes.start(*argv, tag=tag, envs=envs, cwd=cwd, user=user)
    say(started, started.tag or "", json=json)


@app.command("list")
def show(id: Id, json: Json = False) -> None:
    """List the commands that run in a sandbox."""
    with open_client() as client:
        found = client.sandboxes.get(id).processes.list()
    if json:
        print_json(found)
        return
    rows = [(str(each.pid), each.tag or "", " ".join((each.cmd, *each.args))) for each in found]
    print_table(("PID", "TAG", "COMMAND"), rows)


@app.command("attach")
def attach(id: Id, process: Name) -> None:
    """Follow a command, what it has written so far first. Exits with its exit code.

    Ctrl-C ends the following and not the command. 125: the connection was lost. 130: interrupted.
    """
    code = FAILED
    with (
        own_failures(),
        open_client() as client,
        client.sandboxes.get(id).processes.attach(process) as stream,
    ):
        for frame in stream:
            if isinstance(frame, Exit):
                code = frame.exit_code
            else:
                write_all(2 if isinstance(frame, Stderr) else 1, frame.data)
    raise typer.Exit(code)


@app.command("kill")
def kill(
    id: Id,
    process: Name,
    signal: Annotated[
        Literal["SIGKILL", "SIGTERM"], typer.Option(help="What to send to its process group.")
    ] = "SIGKILL",
) -> None:
    """End a command."""
    with open_client() as client:
        client.sandboxes.get(id).processes.signal(process, signal)
