"""One HTTP/1.1 connection to a guest agent, with bounds on everything the guest may send.

httptools parses; this module keeps the bounds, the back-pressure and the order of calls.
"""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, cast

import httptools

from wrenn_sandbox.aio import first_of
from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.patience import patience

Connect = Callable[[], Awaitable[socket.socket]]
"""Opens a connected, non-blocking socket to the agent; raises OSError."""

ConnectPort = Callable[[int], Awaitable[socket.socket]]
"""The same to another port of the guest."""

HEADER_LIMIT: Final = 1024 * 1024
HEADER_COUNT_LIMIT: Final = 100
BODY_LIMIT: Final = 8 * 1024 * 1024
ANSWER_SEC: Final = 30.0
"""How long a guest may take until an answer begins that asks for no work but its own."""
SILENCE_SEC: Final = 120.0
"""How long a guest may say and take nothing at all in the middle of something: its agent was asked
to break each silence after `KEEPALIVE_SEC`."""
KEEPALIVE_SEC: Final = 30
UPLOAD_BYTES_PER_SEC: Final = 4 * 1024 * 1024
"""At least so much of an upload a guest's disk takes."""
TAKEN_SEC: Final = 5.0
"""How long a kept connection may take until the guest's kernel has anything of a new request: as
long as a new one may take to come to be. Nothing is asked of the agent, nor of who reads later."""
UPLOAD_CHUNK: Final = 512 * 1024
"""Bytes of an upload that are gathered before they are sent."""
SILENT: Final = "The guest does not respond"
CLOSED: Final = "The sandbox closed the connection"
_HIGH_WATER: Final = 1024 * 1024
_LOW_WATER: Final = 256 * 1024
_SMALL: Final = 4 * 1024
"""Bytes of a piece of a body that is put to others: as an object it costs more than it holds."""

_PIECES_LIMIT: Final = 8192
"""Pieces in what arrives at once, 256 KiB at most: the agent's smallest have some 45 bytes."""


class GuestGone(AgentError):
    """The agent closed the connection, cannot be reached or does not speak HTTP."""


class GuestUnreachable(GuestGone):
    """No connection came to be, so nothing was asked."""


class _Refused(Exception):
    """The guest said something that it may not say."""


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._small = bytearray()
        self._pieces = 0
        self._buffered = 0
        self._wake = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._asked = False
        self._given = 0
        self._watch: asyncio.TimerHandle | None = None
        self._headers_done = False
        self._complete = False
        self._header_bytes = 0
        self._header_count = 0
        self._failure: GuestGone | None = None
        self._paused = False
        self._cut = self._kept_alive = self._read = False
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def open(cls, connect: Connect) -> "Connection":
        """Connect; raises `GuestUnreachable`."""
        try:
            sock = await connect()
        except OSError as error:
            raise GuestUnreachable(SILENT, detail=f"connect: {error}") from error
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: cls(sock), sock=sock)
        except BaseException:
            sock.close()
            raise
        return connection

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent.

        The last answer is complete and was read to its end, and nothing came after it, be it the
        end of the connection. The kernel is asked: the loop may not have heard of it yet.
        """
        return (
            self._failure is None
            and self._complete
            and self._read
            and self._kept_alive
            and not self._cut
            and self._is_silent()
        )

    def _is_silent(self) -> bool:
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close at once; safe to repeat."""
        self._fail("closed here")
        if self._transport is not None:
            self._transport.abort()

    async def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        seconds: float | None = None,
    ) -> None:
        """Send a request whole and wait for the head of its answer; raises `GuestGone`.

        Also after so many seconds, where the caller sets no time limit of its own for all of it.
        """
        self._begin()
        if body or method in ("POST", "PUT"):
            headers = {**headers, "Content-Length": str(len(body))}
        async with self._unless_silent(seconds):
            await self._send(_request_head(method, target, headers) + body)
            await self._head(None)

    async def upload(
        self, method: str, target: str, headers: Mapping[str, str], chunks: AsyncIterator[bytes]
    ) -> None:
        """Send a request with `chunks` as its body and wait for the head of its answer.

        Nothing more is sent once the guest has answered. When `chunks` raises, the connection is
        cut, so that the guest sees a body that is not complete, and the error is raised here.
        """
        self._begin()
        self._cut = True
        headers = {**headers, "Transfer-Encoding": "chunked"}
        await self._send(_request_head(method, target, headers))
        async with first_of(self._head(None), self._send_chunks(chunks)) as (answered, sent):
            if not answered.done() and not isinstance(sent.exception(), GuestGone):
                sent.result()
                self._cut = False
            async with self._unless_silent(ANSWER_SEC + self._given / UPLOAD_BYTES_PER_SEC):
                await answered

    async def _send_chunks(self, chunks: AsyncIterator[bytes]) -> None:
        """Send few large chunks: taking one apart costs the guest more than gathering costs us."""
        waiting: list[bytes] = []
        size = 0
        async for chunk in chunks:
            waiting.append(chunk)
            size += len(chunk)
            if size >= UPLOAD_CHUNK:
                await self._send(_chunk(size, waiting))
                waiting.clear()
                size = 0
        rest = _chunk(size, waiting) if size else b""
        await self._send(rest + b"0\r\n\r\n")

    async def _head(self, seconds: float | None) -> None:
        """Wait for the status line and headers of the answer."""
        while not self._headers_done:
            await self._progress(seconds)

    async def body(self, limit: int = BODY_LIMIT) -> bytes:
        """The whole body, at most `limit` bytes; raises `GuestGone`."""
        parts = bytearray()
        async for chunk in self.chunks():
            parts += chunk
            if len(parts) > limit:
                self.close()
                raise GuestGone("The sandbox sent too long an answer")
        return bytes(parts)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives; reading slowly slows the guest down."""
        while True:
            while self._chunks or self._small:
                yield self._take()
            if self._complete:
                self._read = True
                return
            await self._progress(SILENCE_SEC)

    def _take(self) -> bytes:
        """The next piece of the body, small ones as one."""
        if not self._chunks:
            self._put_small()
        chunk = self._chunks.popleft()
        self._buffered -= len(chunk)
        if self._paused and self._buffered < _LOW_WATER:
            self._paused = False
            if self._transport is not None:
                self._transport.resume_reading()
        return chunk

    def _put_small(self) -> None:
        if self._small:
            self._chunks.append(bytes(self._small))
            self._small.clear()

    def _begin(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._headers_done:
            self._parser = httptools.HttpResponseParser(self)
            loop = asyncio.get_running_loop()
            self._watch = loop.call_later(patience(TAKEN_SEC), self._require_taken)
        self._chunks.clear()
        self._small.clear()
        self._buffered = 0
        self._headers_done = self._complete = self._read = self._cut = False
        self._asked = True
        self._given = 0
        self._header_bytes = self._header_count = 0
        self.status = 0
        self.headers = {}

    async def _send(self, data: bytes) -> None:
        if self._failure is not None or self._transport is None:
            raise self._failure or GuestGone(CLOSED)
        self._given += len(data)
        self._transport.write(data)
        if not self._writable.is_set():
            async with self._unless_silent(SILENCE_SEC):
                await self._writable.wait()

    def _require_taken(self) -> None:
        """Give up where the kernel has all of the request still, or again."""
        with contextlib.suppress(OSError):
            answer = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
            (kept,) = struct.unpack("i", answer)
            if self._transport is not None and not self._transport.is_closing():
                kept += self._transport.get_write_buffer_size()
                if kept >= self._given > 0:
                    self._abort("nothing of the request was taken", SILENT)

    async def _progress(self, seconds: float | None) -> None:
        """Wait for something to happen, for so many seconds at most; raises `GuestGone`."""
        if self._failure is not None:
            raise self._failure
        self._wake.clear()
        async with self._unless_silent(seconds):
            await self._wake.wait()

    @contextlib.asynccontextmanager
    async def _unless_silent(self, seconds: float | None) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None if seconds is None else patience(seconds)) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            self._abort("silent", SILENT)
            raise GuestGone(SILENT, detail="silent") from error

    def _fail(self, detail: str, message: str = CLOSED) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._failure is None:
            self._failure = GuestGone(message, detail=detail)
        self._wake.set()
        self._writable.set()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._complete:
            self._abort("more than the answer")
            return
        self._header_bytes += len(data)
        if self._header_bytes > HEADER_LIMIT + len(data):
            self._abort("endless header")
            return
        self._pieces = 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._abort(str(error.__context__))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._abort(f"not HTTP: {type(error).__name__}")

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"connection lost: {exc}")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _abort(self, detail: str, message: str = CLOSED) -> None:
        self._fail(detail, message)
        if self._transport is not None:
            self._transport.abort()

    # httptools callbacks: what they raise ends the parsing

    def on_message_begin(self) -> None:
        if not self._asked or self._headers_done:
            raise _Refused("an answer without a question")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        if self._header_count > HEADER_COUNT_LIMIT:
            raise _Refused("too many headers")
        if not self._headers_done:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._headers_done = True
        if self._watch is not None:
            self._watch.cancel()
        self._wake.set()

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        self._pieces += 1
        if self._pieces > _PIECES_LIMIT:
            raise _Refused("a body in crumbs")
        if len(body) < _SMALL:
            self._small += body
        else:
            self._put_small()
            self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > _HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            with contextlib.suppress(RuntimeError):
                self._transport.pause_reading()
        self._wake.set()

    def on_message_complete(self) -> None:
        self._complete = True
        # asked now: afterwards the parser says no for every answer with a body
        self._kept_alive = self._parser.should_keep_alive()
        self._header_bytes = 0
        self._wake.set()


def _chunk(size: int, parts: list[bytes]) -> bytes:
    return b"".join((b"%x\r\n" % size, *parts, b"\r\n"))


def _request_head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    head = [f"{method} {target} HTTP/1.1", "Host: guest"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, "", ""]).encode("latin-1")
