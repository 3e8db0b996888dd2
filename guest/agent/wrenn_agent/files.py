"""The `/files` endpoint: downloads with ranges, uploads raw or as a form."""

from __future__ import annotations

import json
import os
import stat
import time

from .auth import Auth
from .entries import shown
from .errors import InvalidArgument, RangeNotSatisfiable, UnsupportedMedia, from_os_error
from .exchange import Exchange, Headers
from .multipart import MultipartReader
from .upload import AtomicFile, Inflated
from .users import ActingAs, User

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .multipart import Source

SMALL = 64 * 1024
"""Files up to this size are read at once: one system call to send, and honest about /proc."""
_SMALL_LIMIT = 4 * 1024 * 1024
_METADATA_HEADER = "x-metadata-"
_UNSATISFIABLE = -1


class Files:
    """Routes of `/files?path&username`, with the rights of the acting user."""

    def __init__(self, auth: Auth) -> None:
        self._auth = auth

    async def download(self, exchange: Exchange) -> None:
        """`GET` and `HEAD`: the content of one regular file."""
        user = self._auth.user_of(exchange)
        path = user.resolve(exchange.head.query.get("path", ""))
        fd = _open(path, user)
        try:
            info = os.fstat(fd)
            content = _read_small(fd) if info.st_size <= SMALL else None
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
        """`POST`: one file as the raw body, or the parts `file` of a form."""
        user = self._auth.user_of(exchange)
        source = _decoded(exchange)
        path = exchange.head.query.get("path")
        media_type = exchange.head.media_type
        if media_type == "multipart/form-data":
            written = await _receive_form(exchange, source, user, path)
        elif media_type == "application/octet-stream":
            written = [await _receive_file(exchange, source, user, path or "")]
        else:
            raise UnsupportedMedia("send multipart/form-data or application/octet-stream")
        await exchange.reply(200, _listing(written, _metadata(exchange)))


async def _receive_form(
    exchange: Exchange, source: Source, user: User, path: str | None
) -> list[str]:
    reader = MultipartReader(source, exchange.headers.get("content-type", ""))
    written: list[str] = []
    while (part := await reader.next_part()) is not None:
        if part.name != "file":
            continue
        if path is not None and written:
            raise InvalidArgument("with `path` there must be exactly one part `file`")
        target = part.filename if path is None else path
        written.append(await _receive_file(exchange, reader, user, target or ""))
    if not written:
        raise InvalidArgument("the form has no part `file`")
    return written


async def _receive_file(exchange: Exchange, source: Source, user: User, path: str) -> str:
    if path.endswith("/"):
        raise InvalidArgument("path names a directory")
    path = user.resolve(path)
    metadata = _metadata(exchange)
    with AtomicFile(path, user) as file:
        while piece := await source.piece():
            file.write(piece)
        file.commit(metadata)
    return path


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


def _listing(written: list[str], metadata: dict[str, bytes]) -> bytes:
    kept = {name: value.decode("utf-8", "replace") for name, value in metadata.items()}
    extra = {"metadata": kept} if kept else {}
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


def _read_small(fd: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        while size < _SMALL_LIMIT and (part := os.read(fd, SMALL + 1)):
            parts.append(part)
            size += len(part)
    except OSError as error:
        raise from_os_error(error, "file cannot be read") from error
    return b"".join(parts)


def _select_range(exchange: Exchange, size: int) -> tuple[int, int, int, Headers]:
    """Status, first byte, number of bytes and headers of the answer for a file of `size` bytes."""
    wanted = exchange.headers.get("range")
    selected = parse_range(wanted, size) if wanted and "if-range" not in exchange.headers else None
    if selected is None:
        return 200, 0, size, ()
    start, count = selected
    if start == _UNSATISFIABLE:
        raise RangeNotSatisfiable(f"the file has {size} bytes")
    return 206, start, count, (("Content-Range", f"bytes {start}-{start + count - 1}/{size}"),)


def parse_range(value: str, size: int) -> tuple[int, int] | None:
    """First byte and number of bytes; None to ignore the header, (-1, 0) when outside the file."""
    unit, _, text = value.partition("=")
    first, dash, last = text.strip().partition("-")
    if unit.strip().lower() != "bytes" or not dash or not (first + last).isdigit():
        return None  # other units, several ranges, nonsense: the whole file is a valid answer
    if not first:
        count = min(int(last), size)
        return (size - count, count) if count else (_UNSATISFIABLE, 0)
    start, end = int(first), min(int(last), size - 1) if last else size - 1
    if last and int(last) < start:
        return None
    return (start, end - start + 1) if start < size else (_UNSATISFIABLE, 0)


def _http_date(seconds: float) -> str:
    moment = time.gmtime(seconds)
    day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.tm_wday]
    return time.strftime(f"{day}, %d %b %Y %H:%M:%S GMT", moment)
