# Made by tools/make_sync_client.py from _async/files.py: change that file.
"""Files of one sandbox. Paths are absolute or relative to /root; bytes where they are no UTF-8."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import urlencode

import httpx2
import msgspec

from wrenn_sandbox.client.aside import aside
from wrenn_sandbox.client.errors import ClientError
from wrenn_sandbox.client.models import (
    Copied,
    FileEntry,
    FileList,
    LeftOut,
    MadeDirectory,
)
from wrenn_sandbox.client.multipart import Form, naming, upload_fields
from wrenn_sandbox.client.tar.pack import pack, source_of, total_size
from wrenn_sandbox.client.transport import decode, given, http_failures
from wrenn_sandbox.client.unpacking import Unpacker

from .api import Api


class Download:
    """A file being read: iterate for its bytes. `size` is in bytes, where the server knows it."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        length = response.headers.get("content-length")
        self.size = int(length) if length is not None else None

    def __iter__(self) -> Iterator[bytes]:
        with http_failures():
            yield from self._response.iter_raw()


Progress = Callable[[int, int | None], None]
"""Is told how many bytes more have gone through, and of how many, where that is known."""

_NAMED = 1000
"""How many paths are named that were left out."""


def _ignore(_count: int, _total: int | None) -> None:
    """Progress that nobody looks at."""


class Files:
    """`NotFound`: there is no such file. `InvalidRequest`: it is of another kind than needed."""

    def __init__(self, api: Api, path: str) -> None:
        self._api = api
        self._path = path

    def read(self, path: str | bytes) -> bytes:
        """The whole content of a file."""
        return self._api.request("POST", f"{self._path}/read", naming(path))

    @contextlib.contextmanager
    def read_stream(self, path: str | bytes) -> Iterator[Download]:
        """The content of a file in pieces, as long as the block lasts.

        A transfer that breaks off raises `ConnectionFailed` and never ends like a shorter file.
        """
        with self._api.receive(f"{self._path}/stream/read", naming(path)) as response:
            yield Download(response)

    def write(
        self,
        path: str | bytes,
        data: bytes | str,
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        """Make or replace a file, and the directories above it. `NoSpace`: the disk is full.

        What is new belongs to `user` (root). A file that is replaced keeps its owner, attributes
        and hard links, and its permission bits unless `mode` (0o644 for a new file) says others.
        """
        content = data.encode() if isinstance(data, str) else data
        self._send("write", path, _once(content), len(content), user, mode)

    def write_stream(
        self,
        path: str | bytes,
        chunks: Iterable[bytes],
        size: int | None = None,
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        """Make or replace a file with all of `chunks`, or leave it as it was; as `write`.

        `size` is what the chunks come to in bytes, where that is known; `ClientError`: they do not.
        """
        self._send("stream/write", path, chunks, size, user, mode)

    def _send(
        self,
        route: str,
        path: str | bytes,
        chunks: Iterable[bytes],
        size: int | None,
        user: str | None,
        mode: int | None,
    ) -> None:
        form = Form.of(upload_fields(path, user, mode))
        content = _pieces(form, chunks, size)
        self._api.send("POST", f"{self._path}/{route}", content, form.headers(size))

    @contextlib.contextmanager
    def read_archive(
        self, path: str, *, recursive: bool = True, user: str | None = None
    ) -> Iterator[Download]:
        """A file or a tree as a tar archive, as long as the block lasts.

        Nobody vouches for what is in it: unpack it with care. A transfer that breaks off raises
        `ConnectionFailed`. `InvalidRequest`: it is a directory and not `recursive`.
        """
        target = self._archive(path, user=user, recursive="true" if recursive else None)
        with self._api.receive(target, method="GET") as response:
            yield Download(response)

    def write_archive(
        self,
        path: str,
        chunks: Iterable[bytes],
        *,
        directory: bool = False,
        user: str | None = None,
    ) -> Copied:
        """Unpack a tar archive into a directory, or in the place of `path`, as `cp` would.

        With `directory` the latter is refused. All of it is `user`'s, by default root's. The
        answer says what was left out.
        """
        target = self._archive(path, directory="true" if directory else None, user=user)
        headers = {"Content-Type": "application/octet-stream"}
        return decode(self._api.send("PUT", target, chunks, headers), Copied)

    def upload(
        self,
        sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        path: str,
        *,
        recursive: bool = True,
        user: str | None = None,
        progress: Progress = _ignore,
    ) -> Copied:
        """Copy files and trees of this machine, with modes, times and links, as `cp` would.

        Into `path` when that is a directory, which several sources need; else to `path`. What can
        not be read is left out, and so are directories unless `recursive`. `InvalidRequest`: `path`
        is of another kind than needed.
        """
        several = [sources] if isinstance(sources, str | os.PathLike) else sources
        found = [source_of(os.fspath(each), recursive=recursive) for each in several]
        left_out: list[LeftOut] = []
        pieces = pack(
            found,
            lambda path, reason: left_out.append(LeftOut(path, reason)),
            recursive=recursive,
        )
        total = aside(total_size, found)
        copied = self.write_archive(
            path, _told(pieces, progress, total), directory=len(found) > 1, user=user
        )
        return msgspec.structs.replace(
            copied,
            left_out=(*left_out, *copied.left_out),
            left_out_count=len(left_out) + copied.left_out_count,
        )

    def download(
        self,
        path: str,
        target: str | os.PathLike[str],
        *,
        recursive: bool = True,
        user: str | None = None,
        keep_links: bool = False,
        progress: Progress = _ignore,
    ) -> Copied:
        """Copy a file or a tree to `target`, with modes, times and links.

        A directory that is there is added to. Nothing outside `target` is written, whatever the
        sandbox sends; symbolic links that lead out of it are left out, unless `keep_links`.
        `InvalidRequest`: it is a directory and not `recursive`. `ClientError`: `target` is empty.
        """
        left_out: list[LeftOut] = []
        count = 0

        def tell(path: str, reason: str) -> None:
            nonlocal count
            count += 1
            if count <= _NAMED:
                left_out.append(LeftOut(path, reason))

        with self.read_archive(path, recursive=recursive, user=user) as archive:
            unpacker = Unpacker(os.fspath(target), tell, recursive=recursive, keep_links=keep_links)
            try:
                for piece in archive:
                    aside(unpacker.feed, piece)
                    progress(len(piece), unpacker.total)
                aside(unpacker.finish)
            finally:
                aside(unpacker.close)
        return Copied(
            unpacker.entries, unpacker.size, left_out=tuple(left_out), left_out_count=count
        )

    def _archive(self, path: str, **options: str | None) -> str:
        query = urlencode(given(path=path, **options), errors="surrogateescape")
        return f"{self._path}/archive?{query}"

    def list(self, path: str | bytes, depth: int = 1) -> tuple[FileEntry, ...]:
        """What is in a directory, `depth` levels down; each entry right before what is in it."""
        body = {**naming(path), "depth": depth}
        return (self._api.call("POST", f"{self._path}/list", FileList, body)).entries

    def mkdir(
        self, path: str | bytes, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        """Make a directory and those above it, for `user` (root); `mode` (0o755) is its own.

        `Conflict`: something is there already.
        """
        body = upload_fields(path, user, mode)
        answer = self._api.call("POST", f"{self._path}/mkdir", MadeDirectory, body)
        return answer.entry

    def remove(self, path: str | bytes) -> None:
        """Remove a file, or a directory with all that is in it."""
        self._api.request("POST", f"{self._path}/remove", naming(path))


def _pieces(form: Form, chunks: Iterable[bytes], size: int | None) -> Iterator[bytes]:
    yield form.head
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if size is not None and count > size:
            break
        yield chunk
    if size is not None and count != size:
        raise ClientError(f"the file was to have {size} bytes and has {count} so far")
    yield form.tail


def _once(content: bytes) -> Iterator[bytes]:
    yield content


def _told(pieces: Iterator[bytes], progress: Progress, total: int | None) -> Iterator[bytes]:
    while (piece := aside(next, pieces, None)) is not None:
        yield piece
        progress(len(piece), total)
