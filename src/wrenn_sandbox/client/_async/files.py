"""Files of one sandbox. Paths are absolute or relative to /root; bytes where they are no UTF-8."""

import contextlib
from collections.abc import AsyncIterable, AsyncIterator

import httpx2

from wrenn_sandbox.client.errors import ClientError
from wrenn_sandbox.client.models import FileEntry, FileList, MadeDirectory
from wrenn_sandbox.client.multipart import Form, naming, upload_fields
from wrenn_sandbox.client.transport import http_failures

from .api import AsyncApi


class AsyncDownload:
    """A file being read: iterate for its bytes. `size` is in bytes, where the server knows it."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        length = response.headers.get("content-length")
        self.size = int(length) if length is not None else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with http_failures():
            async for chunk in self._response.aiter_raw():
                yield chunk


class AsyncFiles:
    """`NotFound`: there is no such file. `InvalidRequest`: it is of another kind than needed."""

    def __init__(self, api: AsyncApi, path: str) -> None:
        self._api = api
        self._path = path

    async def read(self, path: str | bytes) -> bytes:
        """The whole content of a file."""
        return await self._api.fetch(f"{self._path}/read", naming(path))

    @contextlib.asynccontextmanager
    async def read_stream(self, path: str | bytes) -> AsyncIterator[AsyncDownload]:
        """The content of a file in pieces, as long as the block lasts.

        A transfer that breaks off raises `ConnectionFailed` and never ends like a shorter file.
        """
        async with self._api.receive(f"{self._path}/stream/read", naming(path)) as response:
            yield AsyncDownload(response)

    async def write(
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
        form = Form.of(upload_fields(path, user, mode))
        await self._api.send(
            f"{self._path}/write",
            _pieces(form, _once(content), len(content)),
            form.headers(len(content)),
        )

    async def write_stream(
        self,
        path: str | bytes,
        chunks: AsyncIterable[bytes],
        size: int | None = None,
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        """Make or replace a file with all of `chunks`, or leave it as it was; as `write`.

        `size` is what the chunks come to in bytes, where that is known; `ClientError`: they do not.
        """
        form = Form.of(upload_fields(path, user, mode))
        await self._api.send(
            f"{self._path}/stream/write", _pieces(form, chunks, size), form.headers(size)
        )

    async def list(self, path: str | bytes, depth: int = 1) -> tuple[FileEntry, ...]:
        """What is in a directory, `depth` levels down; each entry right before what is in it."""
        body = {**naming(path), "depth": depth}
        return (await self._api.call("POST", f"{self._path}/list", FileList, body)).entries

    async def mkdir(
        self, path: str | bytes, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        """Make a directory and those above it, for `user` (root); `mode` (0o755) is its own.

        `Conflict`: something is there already.
        """
        body = upload_fields(path, user, mode)
        answer = await self._api.call("POST", f"{self._path}/mkdir", MadeDirectory, body)
        return answer.entry

    async def remove(self, path: str | bytes) -> None:
        """Remove a file, or a directory with all that is in it."""
        await self._api.tell("POST", f"{self._path}/remove", naming(path))


async def _pieces(
    form: Form, chunks: AsyncIterable[bytes], size: int | None
) -> AsyncIterator[bytes]:
    yield form.head
    count = 0
    async for chunk in chunks:
        count += len(chunk)
        if size is not None and count > size:
            break
        yield chunk
    if size is not None and count != size:
        raise ClientError(f"the file was to have {size} bytes and has {count} so far")
    yield form.tail


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
