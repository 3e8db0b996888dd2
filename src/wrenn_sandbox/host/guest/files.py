"""Files of one guest, through its agent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated
from urllib.parse import quote

import msgspec

from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.wire.messages import FileContent, FileEntry, FileType

from .client import CALL_SEC, GuestClient
from .connect_rpc import Mode, decode, malformed, refusal, unary_error
from .connection import ANSWER_SEC, BODY_LIMIT

_SERVICE = "filesystem.Filesystem/"
_SIZE_DIGITS = 18
_ANSWER_BYTES = 64 * 1024
_ENTRIES = 20_000
"""As many as the agent lists."""
_LINK_MODE = 0o777
"""Of every symlink; its agent says its target's."""
_ASIDE_BYTES = 64 * 1024
"""An answer above this is taken apart in a thread."""


class _Entry(msgspec.Struct, rename="camel"):
    name: str
    path: str
    type: str
    size: str
    mode: Mode
    permissions: str
    owner: str
    group: str
    modified_time: Annotated[datetime, msgspec.Meta(tz=True)]
    symlink_target: str | None = None
    link_target: str | None = None
    raw_path: str | None = None

    def plain(self) -> FileEntry:
        if not _is_name(self.name) or not _is_path(self.path, self.name):
            raise malformed("name of a file")
        kind = FileType.DIRECTORY if self.type == "FILE_TYPE_DIRECTORY" else FileType.FILE
        return FileEntry(
            name=self.name,
            path=self.path,
            type=kind if self.symlink_target is None else FileType.SYMLINK,
            size=_size(self.size),
            mode=self.mode if self.symlink_target is None else _LINK_MODE,
            permissions=self.permissions,
            owner=self.owner,
            group=self.group,
            modified_at=self.modified_time,
            symlink_target=self.link_target or self.symlink_target,
            raw_path=self.raw_path,
        )


class _Entries(msgspec.Struct):
    entries: list[_Entry] = []


class _Written(msgspec.Struct):
    """A file that was uploaded; an agent says back what it was asked to give it."""

    owner: str | None = None
    mode: Mode | None = None


class _Made(_Written, kw_only=True):
    entry: _Entry


class GuestFiles:
    """Calls raise what `Guest` says of them."""

    def __init__(self, client: GuestClient) -> None:
        self._client = client

    @asynccontextmanager
    async def read_file(self, path: str) -> AsyncIterator[FileContent]:
        async with self._client.connection() as connection:
            headers = self._client.credentials()
            await connection.request("GET", _target(path), headers, seconds=ANSWER_SEC)
            if connection.status != 200:
                error = unary_error(connection.status, await connection.body(_ANSWER_BYTES))
                raise refusal(error, connection.status)
            length = connection.headers.get("content-length")
            size = None if length is None else _size(length)
            yield FileContent(size, connection.chunks())

    async def write_file(
        self,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        headers = {"Content-Type": "application/octet-stream", **self._client.credentials()}
        target = _target(path)
        if user is not None:
            target += "&owner=" + quote(user, safe="")
        if mode is not None:
            target += f"&mode={mode:04o}"
        async with self._client.connection() as connection:
            await connection.upload("POST", target, headers, chunks)
            body = await connection.body(_ANSWER_BYTES)
            if connection.status != 200:
                raise refusal(unary_error(connection.status, body), connection.status)
        if user is not None or mode is not None:
            for written in decode(body, list[_Written]):
                _require_heard(written, user, mode)

    async def list_directory(self, path: str, depth: int) -> list[FileEntry]:
        answer = await self._client.rpc(
            _SERVICE + "ListDir",
            {**_named(path), "depth": depth},
            limit=BODY_LIMIT,
            seconds=CALL_SEC,
        )
        if len(answer) < _ASIDE_BYTES:
            return _listing(answer)
        return await asyncio.to_thread(_listing, answer)

    async def make_directory(
        self, path: str, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        message = _named(path)
        if user is not None:
            message["owner"] = user
        if mode is not None:
            message["mode"] = f"{mode:04o}"
        answer = await self._client.rpc(_SERVICE + "MakeDir", message, seconds=CALL_SEC)
        made = decode(answer, _Made)
        _require_heard(made, user, mode)
        return made.entry.plain()

    async def remove_path(self, path: str) -> None:
        message = {**_named(path), "mustExist": True}
        await self._client.rpc(_SERVICE + "Remove", message, seconds=CALL_SEC)


def _target(path: str) -> str:
    return "/files?path=" + quote(path, safe="/", errors="surrogateescape")


def _named(path: str) -> dict[str, object]:
    """The field of a message that names this path; JSON knows UTF-8 alone."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return {"rawPath": path.encode("utf-8", "surrogateescape")}
    return {"path": path}


def _require_heard(written: _Written, user: str | None, mode: int | None) -> None:
    """An agent that continues from before these fields does what it is asked without them."""
    if (written.owner, written.mode) != (user, mode):
        raise AgentError(
            "The sandbox is older than these fields: it was done, without user and mode"
        )


def _listing(answer: bytes) -> list[FileEntry]:
    entries = decode(answer, _Entries).entries
    if len(entries) > _ENTRIES:
        raise AgentError("The sandbox sent too long an answer")
    return [entry.plain() for entry in entries]


def _is_name(text: str) -> bool:
    """Whether a client may make a file of this name beside others: never outside."""
    return text not in ("", ".", "..") and "/" not in text and "\0" not in text


def _is_path(text: str, name: str) -> bool:
    parent, _, last = text.rpartition("/")
    return text.startswith("/") and last == name and ".." not in parent.split("/")


def _size(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _SIZE_DIGITS):
        raise malformed("size of a file")
    return int(text)
