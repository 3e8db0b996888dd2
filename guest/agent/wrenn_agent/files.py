"""The `/files` endpoint: downloads with ranges, uploads raw or as a form."""

from __future__ import annotations

import json
import os
import stat
import time

from .auth import Auth
from .entries import shown
from .errors import (
    InvalidArgument,
    NotFound,
    RangeNotSatisfiable,
    UnsupportedMedia,
    from_os_error,
)
from .exchange import Exchange, Headers
from .loop import Loop
from .multipart import MultipartReader
from .upload import AtomicFile, Inflated
from .users import ActingAs, User

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from .multipart import Source

SMALL = 64 * 1024
"""Files up to this size are read before they are sent: one system call to send, and honest about
/proc, whose files have the size 0 and a content."""
_READ_BEFORE = 1024 * 1024
"""Bytes of such a file that are read before; one with more is sent without a length."""
_METADATA_HEADER = "x-metadata-"


class Files:
    """Routes of `/files?path&username`, with the rights of the acting user."""

    def __init__(self, loop: Loop, auth: Auth) -> None:
        self._loop = loop
        self._auth = auth

    async def download(self, exchange: Exchange) -> None:
        """`GET` and `HEAD`: the content of one regular file."""
        user = self._auth.user_of(exchange)
        path = user.resolve(exchange.head.query.get("path", ""))
        fd = _open(path, user)
        try:
            info = os.fstat(fd)
            content = _read(fd, path, _READ_BEFORE) if info.st_size <= SMALL else None
            if content is not None and len(content) >= _READ_BEFORE:
                await self._send_unmeasured(exchange, fd, path, content)
                return
            size = info.st_size if content is None else len(content)
            status, start, count, headers = _select_range(exchange, size)
            headers += (
                ("Content-Type", "application/octet-stream"),
                ("Accept-Ranges", "bytes"),
                ("Last-Modified", _http_date(info.st_mtime)),
            )
            first = b"" if content is None else content[start : start + count]
            await exchange.send_head(status, headers, count, first)
            if content is None and exchange.head.method != "HEAD":
                await exchange.connection.send_file(fd, start, count)
        finally:
            os.close(fd)

    async def upload(self, exchange: Exchange) -> None:
        """`POST`: one file as the raw body, or the parts `file` of a form.

        Files are made as root and given to `owner` or the acting user. `mode` is octal.
        """
        query = exchange.head.query
        user = self._auth.user_of(exchange)
        name, mode = query.get("owner", ""), parse_mode(query)
        owner = self._auth.user(name) if name else user
        metadata = _metadata(exchange)

        async def receive(content: Source, path: str) -> str:
            if path.endswith("/"):
                raise InvalidArgument("path names a directory")
            path = user.resolve(path)
            with AtomicFile(self._loop, path, owner, mode) as file:
                while piece := await content.piece():
                    file.write(piece)
                await file.commit(metadata)
            return path

        source = _decoded(exchange)
        media_type = exchange.head.media_type
        if media_type == "multipart/form-data":
            reader = MultipartReader(source, exchange.headers.get("content-type", ""))
            written = await _receive_form(reader, query.get("path"), receive)
        elif media_type == "application/octet-stream":
            written = [await receive(source, query.get("path", ""))]
        else:
            raise UnsupportedMedia("send multipart/form-data or application/octet-stream")
        await exchange.reply(200, _listing(written, as_asked(name, mode), metadata))

    async def _send_unmeasured(
        self, exchange: Exchange, fd: int, path: str, content: bytes
    ) -> None:
        """Send a file whose size says nothing, of which `content` was read; ranges are ignored."""
        await exchange.send_head(200, (("Content-Type", "application/octet-stream"),), None)
        if exchange.head.method == "HEAD":
            return
        while content:
            await exchange.send_chunk(content)
            await self._loop.breathe()
            content = _read(fd, path, SMALL)
        await exchange.send_chunk(b"")


def parse_mode(message: Mapping[str, object]) -> int | None:
    """The octal digits in `mode`, None without; raises InvalidArgument."""
    text = message.get("mode")
    if text is None:
        return None
    if not isinstance(text, str) or not 3 <= len(text) <= 4 or text.strip("01234567"):
        raise InvalidArgument("mode must be 3 or 4 octal digits, such as 755 or 0644")
    return int(text, 8)


def as_asked(owner: str, mode: int | None) -> dict[str, object]:
    """What an answer says back, so that the caller knows that it was understood."""
    asked: dict[str, object] = {"owner": owner} if owner else {}
    if mode is not None:
        asked["mode"] = mode
    return asked


async def _receive_form(
    reader: MultipartReader, path: str | None, receive: Callable[[Source, str], Awaitable[str]]
) -> list[str]:
    written: list[str] = []
    while (part := await reader.next_part()) is not None:
        name, filename = part
        if name != "file":
            continue
        if path is not None and written:
            raise InvalidArgument("with `path` there must be exactly one part `file`")
        target = filename if path is None else path
        written.append(await receive(reader, target or ""))
    if not written:
        raise InvalidArgument("the form has no part `file`")
    return written


def _decoded(exchange: Exchange) -> Source:
    encoding = exchange.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return exchange.body
    if encoding == "gzip":
        return Inflated(exchange.body)
    raise UnsupportedMedia("content encoding must be gzip")


def _metadata(exchange: Exchange) -> dict[str, bytes]:
    metadata: dict[str, bytes] = {}
    for name, value in exchange.headers.items():
        if name.startswith(_METADATA_HEADER):
            key = name[len(_METADATA_HEADER) :]
            if not key.isascii() or not key.replace("-", "").replace("_", "").isalnum():
                raise InvalidArgument("metadata names must be letters, digits, `-` and `_`")
            metadata[key] = value.encode("latin-1")
    return metadata


def _listing(written: list[str], asked: dict[str, object], metadata: dict[str, bytes]) -> bytes:
    kept = {name: value.decode("utf-8", "replace") for name, value in metadata.items()}
    extra = {"metadata": kept, **asked} if kept else asked
    entries = [
        {"path": shown(path), "name": shown(os.path.basename(path)), "type": "file", **extra}
        for path in written
    ]
    return json.dumps(entries).encode()


def _open(path: str, user: User) -> int:
    """Open a regular file; anything else is refused, unopened where opening it would do harm."""
    with ActingAs(user):
        try:
            _check_regular(os.stat(path).st_mode, path)
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            if os.path.islink(path):
                raise NotFound(f"{path} is a link that leads nowhere") from error
            raise from_os_error(error, path) from error
        except OSError as error:
            raise from_os_error(error, path) from error
    try:
        _check_regular(os.fstat(fd).st_mode, path)
    except InvalidArgument:
        os.close(fd)
        raise
    return fd


def _check_regular(mode: int, path: str) -> None:
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise InvalidArgument(f"{path} is {kind}")


def _read(fd: int, path: str, enough: int) -> bytes:
    """What there is to read, no more than needed for `enough` bytes."""
    parts: list[bytes] = []
    size = 0
    try:
        while size < enough and (part := os.read(fd, SMALL + 1)):
            parts.append(part)
            size += len(part)
    except BlockingIOError:
        pass  # a log of the kernel: more comes another day
    except OSError as error:
        raise from_os_error(error, f"{path} cannot be read") from error
    return b"".join(parts)


def _select_range(exchange: Exchange, size: int) -> tuple[int, int, int, Headers]:
    """Status, first byte, number of bytes and headers of the answer for a file of `size` bytes."""
    wanted = exchange.headers.get("range")
    selected = parse_range(wanted, size) if wanted and "if-range" not in exchange.headers else None
    if selected is None:
        return 200, 0, size, ()
    start, count = selected
    return 206, start, count, (("Content-Range", f"bytes {start}-{start + count - 1}/{size}"),)


def parse_range(value: str, size: int) -> tuple[int, int] | None:
    """First byte and number of bytes; None to ignore the header; raises RangeNotSatisfiable."""
    unit, _, text = value.partition("=")
    first, dash, last = text.strip().partition("-")
    if unit.strip().lower() != "bytes" or not dash or not (first + last).isdigit():
        return None  # other units, several ranges, nonsense: the whole file is a valid answer
    if not first:
        start, end = max(size - int(last), 0), size - 1
    elif last and int(last) < int(first):
        return None
    else:
        start, end = int(first), min(int(last), size - 1) if last else size - 1
    if start >= size:
        raise RangeNotSatisfiable(f"the file has {size} bytes")
    return start, end - start + 1


def _http_date(seconds: float) -> str:
    moment = time.gmtime(seconds)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.tm_wday]
    return time.strftime(f"{day}, %d %b %Y %H:%M:%S GMT", moment)
