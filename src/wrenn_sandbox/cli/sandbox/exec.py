"""`wrenn sandbox exec`: a command in a sandbox, as if it ran here."""

import base64
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Annotated, Final

import msgspec
import typer

from wrenn_sandbox.cli.account import open_client
from wrenn_sandbox.cli.advice import told
from wrenn_sandbox.cli.output import print_json, printable
from wrenn_sandbox.cli.pump import InputPump, write_all
from wrenn_sandbox.client import (
    ClientError,
    ExecTimeout,
    Exit,
    Sandbox,
    Stderr,
    Stream,
)

TIMED_OUT: Final = 124
FAILED: Final = 125
"""The command did not run, or what became of it is not known."""

_INTERRUPTED: Final = 130
_BROKEN_PIPE: Final = 141
_LONGEST_SEC: Final = 3600


def command(
    id: Annotated[str, typer.Argument(metavar="ID", help="The sandbox's id.")],
    argv: Annotated[
        list[str], typer.Argument(metavar="CMD [ARG...]", help="What to run, without a shell.")
    ],
    stdin: Annotated[
        bool, typer.Option("--stdin", "-i", help="Pass standard input on; else it is empty.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="May be repeated.")
    ] = None,
    cwd: Annotated[str | None, typer.Option(help="Directory to run it in; /root.")] = None,
    user: Annotated[str | None, typer.Option(help="User to run it as; root.")] = None,
    timeout: Annotated[
        int | None,
        typer.Option(metavar="SEC", min=1, help="Kill it after so long, exit with 124."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="All of it as one JSON object, when it has ended.")
    ] = False,
) -> None:
    """Run a command in a sandbox. Exits with its exit code; options come before the id.

    124: it took too long. 125: it did not run, or the connection was lost. 130: interrupted.
    """
    argv = command_of(argv)
    if not argv:
        raise typer.BadParameter("there is nothing to run", param_hint="CMD")
    with own_failures():
        envs = environment_of(env or [])
        with open_client(timeout) as client:
            sandbox = client.sandboxes.get(id)
            if json:
                code = _whole(sandbox, argv, envs, cwd, user, timeout or _LONGEST_SEC)
            else:
                code = _stream(
                    sandbox.exec_stream(*argv, envs=envs, cwd=cwd, user=user, timeout_sec=timeout),
                    stdin,
                    timeout,
                )
    raise typer.Exit(code)


@contextmanager
def own_failures() -> Iterator[None]:
    """Errors of ours as one line and exit codes that few commands use."""
    try:
        yield
    except ClientError as error:
        typer.echo(f"wrenn: {printable(told(error))}", err=True)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:
        raise typer.Exit(_BROKEN_PIPE) from None


def command_of(argv: list[str]) -> list[str]:
    """The command after the id, without the `--` that may stand in between.

    `BadParameter` where an option stands in its place.
    """
    if argv[:1] == ["--"]:
        return argv[1:]
    if argv and argv[0].startswith("-"):
        raise typer.BadParameter(
            f"options come before the id: {argv[0]} would be the command (put -- before one that"
            " begins like this)",
            param_hint="CMD",
        )
    return argv


def environment_of(given: list[str]) -> dict[str, str]:
    return pairs_of(given, "NAME=VALUE", "--env")


def pairs_of(given: list[str], form: str, option: str) -> dict[str, str]:
    """What stands before and after the first `=` of each; `BadParameter` where there is none."""
    pairs = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise typer.BadParameter(f"{each!r} is not {form}", param_hint=option)
        pairs[name] = value
    return pairs


class _Summary(msgspec.Struct, kw_only=True):
    """A command as one JSON object, like the API's; both streams are base64 when one is no text."""

    exit_code: int
    stdout: str
    stderr: str
    encoding: str
    timed_out: bool = False
    truncated: bool = False
    duration_ms: int | None = None


def _whole(
    sandbox: Sandbox,
    argv: list[str],
    envs: dict[str, str],
    cwd: str | None,
    user: str | None,
    timeout: int,
) -> int:
    try:
        result = sandbox.exec(*argv, timeout_sec=timeout, envs=envs, cwd=cwd, user=user)
    except ExecTimeout as error:
        summary = _summary(TIMED_OUT, error.stdout, error.stderr)
        summary.timed_out = True
    else:
        summary = _summary(result.exit_code, result.stdout_bytes, result.stderr_bytes)
        summary.truncated = result.truncated
        summary.duration_ms = result.duration_ms
    print_json(summary)
    return summary.exit_code


def _summary(exit_code: int, stdout: bytes, stderr: bytes) -> _Summary:
    try:
        texts, encoding = (stdout.decode(), stderr.decode()), "utf-8"
    except UnicodeDecodeError:
        encoded = (base64.b64encode(each).decode("ascii") for each in (stdout, stderr))
        texts, encoding = (next(encoded), next(encoded)), "base64"
    return _Summary(exit_code=exit_code, stdout=texts[0], stderr=texts[1], encoding=encoding)


def _stream(opening: AbstractContextManager[Stream], stdin: bool, timeout: int | None) -> int:
    began = time.monotonic()
    try:
        with opening as running:
            left = None if timeout is None else began + timeout - time.monotonic()
            reading = threading.Lock()
            with _limited(running, left, reading):
                return _follow(running, stdin, reading)
    except ExecTimeout as error:
        typer.echo(f"wrenn: {error}", err=True)
        return TIMED_OUT


@contextmanager
def _limited(stream: Stream, seconds: float | None, reading: threading.Lock) -> Iterator[None]:
    """Lets the limit end the command also while its output is not read here.

    Who reads the stream holds `reading`.
    """
    if seconds is None:
        yield
        return
    over = threading.Event()

    def expire() -> None:
        with reading, suppress(ClientError):
            if not over.is_set():
                stream.expire()

    timer = threading.Timer(max(0.0, seconds), expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        over.set()
        timer.cancel()


def _follow(stream: Stream, stdin: bool, reading: threading.Lock) -> int:
    code = FAILED
    with ExitStack() as stack:
        if stdin:
            stack.enter_context(InputPump(sys.stdin.fileno(), stream.send, stream.close_stdin))
        else:
            stream.close_stdin()
        coming = iter(stream)
        while True:
            with reading:
                frame = next(coming, None)
            if frame is None:
                return code
            if isinstance(frame, Exit):
                code = frame.exit_code
            else:
                write_all(2 if isinstance(frame, Stderr) else 1, frame.data)
