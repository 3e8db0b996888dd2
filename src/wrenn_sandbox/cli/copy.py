"""`wrenn cp`: files into a sandbox and out of it, with a bar that shows how far it is."""

import contextlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, BinaryIO, Final, Protocol

import msgspec
import typer

from wrenn_sandbox.client import (
    Client,
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    Sandbox,
)

from .account import open_client
from .output import print_json

_REMOTE: Final = re.compile(r"(sb-[a-z0-9]+):(.*)", re.DOTALL)
_PIECE: Final = 256 * 1024


class Tell(Protocol):
    """Is told how many bytes more have gone through."""

    def __call__(self, count: int) -> None: ...


@dataclass(frozen=True)
class _Remote:
    sandbox_id: str
    path: str


class _Copied(msgspec.Struct):
    source: str
    target: str
    size: int


def command(
    source: Annotated[str, typer.Argument(help="A file: PATH here, or ID:PATH in a sandbox.")],
    target: Annotated[str, typer.Argument(help="Where to: a file or a directory; - is a pipe.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    json: Annotated[bool, typer.Option("--json", help="What was copied, as JSON.")] = False,
) -> None:
    """Copy a file into a sandbox or out of it; one of the two is ID:PATH."""
    here, there = _parsed(source), _parsed(target)
    with open_client() as client:
        if isinstance(there, _Remote) and isinstance(here, str):
            copied = _upload(client, here, there, quiet)
        elif isinstance(here, _Remote) and isinstance(there, str):
            copied = _download(client, here, there, quiet)
        else:
            raise typer.BadParameter("one of the two must be ID:PATH, the other a path here")
    if json:
        print_json(copied)


def _parsed(given: str) -> str | _Remote:
    found = _REMOTE.fullmatch(given)
    return given if found is None else _Remote(found[1], found[2])


def _upload(client: Client, source: str, target: _Remote, quiet: bool) -> _Copied:
    sandbox = client.sandboxes.get(target.sandbox_id)
    with _opened(source) as file:
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        path = _path_there(sandbox, target.path, None if source == "-" else Path(source).name)
        with _bar(path, size, quiet) as tell:
            pieces = _Pieces(file, size, tell)
            sandbox.files.write_stream(path, pieces, size)
    return _Copied(source, f"{sandbox.id}:{path}", pieces.count)


@contextlib.contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(source, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        hint = " (of directories: tar -c DIR | wrenn sandbox exec -i ID tar -x)"
        raise ClientError(
            f"{source}: {error.strerror}{hint if isinstance(error, IsADirectoryError) else ''}"
        ) from error
    with file:
        yield file


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


class _Pieces:
    """A file's bytes; not more than its size says, should it grow meanwhile."""

    def __init__(self, file: BinaryIO, size: int | None, tell: Tell) -> None:
        self._file = file
        self._size = size
        self._tell = tell
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._file.read(self._next()):
            self.count += len(piece)
            self._tell(len(piece))
            yield piece

    def _next(self) -> int:
        return _PIECE if self._size is None else min(_PIECE, self._size - self.count)


def _download(client: Client, source: _Remote, target: str, quiet: bool) -> _Copied:
    sandbox = client.sandboxes.get(source.sandbox_id)
    path = target
    if target != "-" and (target.endswith("/") or Path(target).is_dir()):
        path = str(Path(target) / Path(source.path).name)
    count = 0
    with sandbox.files.read_stream(source.path) as download, _made(path) as file:
        with _bar(path, download.size, quiet) as tell:
            for piece in download:
                file.write(piece)
                count += len(piece)
                tell(len(piece))
        if download.size is not None and count != download.size:
            raise ConnectionFailed(f"only {count} of {download.size} bytes came")
    return _Copied(f"{sandbox.id}:{source.path}", path, count)


@contextlib.contextmanager
def _made(path: str) -> Iterator[BinaryIO]:
    """A file that takes its place when it is complete; what is no file is written to."""
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    place = Path(path)
    try:
        if place.exists() and not place.is_file():
            with place.open("wb") as device:
                yield device
            return
        place = place.resolve()
        made = place.with_name(f".wrenn-{secrets.token_hex(8)}")
        with contextlib.ExitStack() as undo:
            with made.open("xb") as file:
                undo.callback(made.unlink)
                if place.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(place.stat().st_mode))
                yield file
            made.replace(place)
            undo.pop_all()
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}") from error


@contextlib.contextmanager
def _bar(path: str, size: int | None, quiet: bool) -> Iterator[Tell]:
    """A progress bar on standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda count: None
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
        task = progress.add_task(escape(PurePath(path).name), total=size)
        yield lambda count: progress.advance(task, count)
