"""`wrenn cp`: files and trees into a sandbox and out of it, with a bar that shows how far it is."""

import contextlib
import os
import posixpath
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, BinaryIO, Final, Literal

import msgspec
import typer

from wrenn_sandbox.client import (
    Client,
    ClientError,
    ConnectionFailed,
    Copied,
    InvalidRequest,
    NotFound,
    Sandbox,
)

from .account import open_client
from .output import print_json, printable

_REMOTE: Final = re.compile(r"(sb-[a-z0-9]+):(.*)", re.DOTALL)
_PIECE: Final = 256 * 1024
_PIPE: Final = "-"


@dataclass(frozen=True)
class _Remote:
    sandbox_id: str
    path: str

    def __str__(self) -> str:
        return f"{self.sandbox_id}:{self.path}"


class _Shown(msgspec.Struct, omit_defaults=True):
    """What was copied, as JSON; `size` in bytes."""

    source: str
    target: str
    size: int
    left_out: int = 0

    def __post_init__(self) -> None:
        self.source, self.target = _text(self.source), _text(self.target)


def _text(path: str) -> str:
    """With replacement characters for what is not UTF-8."""
    return os.fsencode(path).decode(errors="replace")


@dataclass(frozen=True)
class _Options:
    recursive: bool
    user: str | None
    keep_links: bool
    quiet: bool


def command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... TARGET",
            help="Paths here, or ID:PATH in a sandbox; - is a pipe.",
        ),
    ],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", "-R", help="Directories with all that is in them.")
    ] = False,
    user: Annotated[
        str | None, typer.Option(help="User of the sandbox whose files they are; root.")
    ] = None,
    keep_links: Annotated[
        bool,
        typer.Option("--keep-links", help="Download symbolic links that lead out of the tree too."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    json: Annotated[bool, typer.Option("--json", help="What was copied, as JSON.")] = False,
) -> None:
    """Copy files and trees into a sandbox or out of it, with modes, times and links.

    Sources or target are ID:PATH. Exits with 1 when something was left out, and says what.
    """
    if len(paths) < 2:
        raise typer.BadParameter("there must be a source and a target", param_hint="TARGET")
    sources, target = [_parsed(each) for each in paths[:-1]], _parsed(paths[-1])
    if not target:
        raise ClientError("the target is empty: . is the directory you are in")
    here = [each for each in sources if isinstance(each, str)]
    there = [each for each in sources if isinstance(each, _Remote)]
    options = _Options(recursive, user, keep_links, quiet)
    with open_client() as client:
        if isinstance(target, _Remote) and not there:
            shown = _upload_all(client, here, target, options)
        elif isinstance(target, str) and not here:
            if len(there) > 1 and not os.path.isdir(target):
                raise ClientError(f"{target}: it is not a directory, which several sources need")
            shown = [_download(client, each, target, options) for each in there]
        else:
            raise typer.BadParameter("either all sources or the target must be ID:PATH")
    if json:
        print_json(shown[0] if len(shown) == 1 else shown)
    if any(each.left_out for each in shown):
        raise typer.Exit(1)


def _parsed(given: str) -> str | _Remote:
    found = _REMOTE.fullmatch(given)
    return given if found is None else _Remote(found[1], found[2])


def _upload_all(
    client: Client, sources: list[str], target: _Remote, options: _Options
) -> list[_Shown]:
    if len(sources) == 1 and _is_stream(sources[0]):
        return [_upload_stream(client, sources[0], target, options)]
    sandbox = client.sandboxes.get(target.sandbox_id)
    with _bar(sources[0], options.quiet) as tell:
        copied = sandbox.files.upload(
            sources,
            target.path or "./",
            recursive=options.recursive,
            user=options.user,
            progress=tell,
        )
    _complain(copied, sandbox.id)
    place, name = target.path, os.path.basename(sources[0].rstrip("/"))
    if copied.into_directory and len(sources) == 1 and name not in ("", ".", ".."):
        place = posixpath.join(place, name)
    return [_Shown(", ".join(sources), f"{sandbox.id}:{place}", copied.size, copied.left_out_count)]


def _upload_stream(client: Client, source: str, target: _Remote, options: _Options) -> _Shown:
    sandbox = client.sandboxes.get(target.sandbox_id)
    if options.user is not None:
        raise ClientError("--user needs files: what comes through a pipe is root's")
    count = 0
    with _opened(source, "rb") as file:
        path = _path_there(sandbox, target.path, None if source == _PIPE else Path(source).name)
        with _bar(path, options.quiet) as tell:

            def pieces() -> Iterator[bytes]:
                nonlocal count
                while piece := file.read(_PIECE):
                    count += len(piece)
                    tell(len(piece), None)
                    yield piece

            sandbox.files.write_stream(path, pieces())
    return _Shown(source, f"{sandbox.id}:{path}", count)


def _is_stream(path: str) -> bool:
    """Whether it is standard input or output, a pipe or a device: something without a mode."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return path == _PIPE
    return path == _PIPE or not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def _complain(copied: Copied, sandbox_id: str) -> None:
    """Tell what was left out."""
    for each in copied.left_out:
        typer.echo(f"wrenn: {printable(each.path)}: {printable(each.reason)}", err=True)
    more = copied.left_out_count - len(copied.left_out)
    if more > 0:
        typer.echo(f"wrenn: {sandbox_id}: {more} more were left out", err=True)


@contextlib.contextmanager
def _opened(path: str, mode: Literal["rb", "wb"]) -> Iterator[BinaryIO]:
    """A pipe or a device, `-` standard input or output; its errors are `ClientError`."""
    if path == _PIPE:
        yield sys.stdin.buffer if mode == "rb" else sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with open(path, mode) as file:
            yield file
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}") from error


def _path_there(sandbox: Sandbox, path: str, name: str | None) -> str:
    """The file to write: `name` in `path` when that is a directory."""
    if name is None:
        return path
    if not path or path.endswith("/"):
        return path + name
    try:
        sandbox.files.list(path)
    except (NotFound, InvalidRequest):
        return path
    return f"{path}/{name}"


def _download(client: Client, source: _Remote, target: str, options: _Options) -> _Shown:
    sandbox = client.sandboxes.get(source.sandbox_id)
    if _is_stream(target):
        return _download_stream(sandbox, source, target, options)
    place, name = target, os.path.basename(source.path.rstrip("/"))
    if name not in ("", ".", "..") and (target.endswith("/") or os.path.isdir(target)):
        place = os.path.join(target, name)
    try:
        with _bar(place, options.quiet) as tell:
            copied = sandbox.files.download(
                source.path or ".",
                place,
                recursive=options.recursive,
                user=options.user,
                keep_links=options.keep_links,
                progress=tell,
            )
    except InvalidRequest as error:
        hint = ": use -r" if not options.recursive and "directory" in error.message else ""
        raise ClientError(f"{source}: {error.message.removeprefix('path: ')}{hint}") from error
    _complain(copied, sandbox.id)
    return _Shown(str(source), place, copied.size, copied.left_out_count)


def _download_stream(sandbox: Sandbox, source: _Remote, target: str, options: _Options) -> _Shown:
    if options.recursive:
        raise ClientError(f"{target}: a pipe takes one file, without -r")
    if options.user is not None:
        raise ClientError("--user needs files: what goes through a pipe is read as root")
    count = 0
    with (
        sandbox.files.read_stream(source.path) as download,
        _opened(target, "wb") as file,
        _bar(source.path, options.quiet) as tell,
    ):
        for piece in download:
            file.write(piece)
            count += len(piece)
            tell(len(piece), download.size)
        if download.size is not None and count != download.size:
            raise ConnectionFailed(f"only {count} of {download.size} bytes came")
    return _Shown(str(source), target, count)


@contextlib.contextmanager
def _bar(path: str, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda count, total: None
        return
    # A tenth of a second that scripts do not need.
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=28)),
        BarColumn(bar_width=20),
        DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
    )  # together no wider than 80 columns
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(escape(printable(PurePath(path).name)), total=None)
        yield lambda count, total: progress.update(task, advance=count, total=total)
