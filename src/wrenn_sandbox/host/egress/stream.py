"""The ends of connections as streams of bytes: sockets, or TLS over them that ends here."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

from .connection import CHUNK, Connection

T = TypeVar("T")

_LINGER_SEC: Final = 2.0


class Stream:
    """One end of a connection, whose time without a byte it counts."""

    def __init__(self, connection: Connection, sock: socket.socket) -> None:
        self._connection = connection
        self._sock = sock

    async def receive(self) -> bytes:
        """Some bytes, none at the end. Raises OSError."""
        return await self._connection.receive(self._sock)

    async def send(self, data: bytes) -> None:
        await self._connection.send(self._sock, data)

    async def ready(self) -> bool:
        """Wait until there is something to receive, and leave it there; False at the end.

        Whoever is cancelled meanwhile loses nothing.
        """
        await self._readable()
        return bool(self._sock.recv(1, socket.MSG_PEEK))

    async def _readable(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._sock)

    async def end(self) -> None:
        """Say that nothing more is sent."""
        self._sock.shutdown(socket.SHUT_WR)

    async def linger(self) -> None:
        """End, and let the other side read: to close before it has sent all would take it away."""
        await self.end()
        loop = asyncio.get_running_loop()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SEC):
                while await loop.sock_recv(self._sock, CHUNK):
                    pass


class TlsStream(Stream):
    """One end that speaks TLS; `shake_hands` comes first.

    As a server it has read `data` before. As a client it calls for the host `name`.
    """

    def __init__(
        self,
        connection: Connection,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        name: str | None = None,
        data: bytes = b"",
    ) -> None:
        super().__init__(connection, sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(data)
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=name is None, server_hostname=name
        )
        self._ahead = b""
        self._sending = asyncio.Lock()

    async def shake_hands(self) -> None:
        """Raises OSError, of which `ssl.SSLError` is one."""
        try:
            await self._do(self._tls.do_handshake)
        finally:
            await self._flush()

    async def receive(self) -> bytes:
        data = self._ahead or await self._read()
        self._ahead = b""
        return data

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest) :]
        await self._flush()

    async def ready(self) -> bool:
        self._ahead = self._ahead or await self._read()
        return bool(self._ahead)

    async def end(self) -> None:
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()
        await super().end()

    async def _read(self) -> bytes:
        with suppress(ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return await self._do(partial(self._tls.read, CHUNK))
        return b""

    async def _do(self, step: Callable[[], T]) -> T:
        """Give OpenSSL what it wants until the step is done.

        What has been taken from the socket is given at once: whoever is cancelled loses nothing.
        """
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                await self._flush()
            await self._readable()
            with suppress(BlockingIOError):
                if data := self._connection.take(self._sock):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()

    async def _flush(self) -> None:
        async with self._sending:
            while data := self._outgoing.read(CHUNK):
                await super().send(data)


async def pump(near: Stream, far: Stream, from_near: bytes = b"", from_far: bytes = b"") -> None:
    """Pass bytes on in both directions, first those that were read before, to both ends."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(near, far, from_near))
            group.create_task(_copy(far, near, from_far))
    except* OSError:
        pass  # one side has reset the connection


async def _copy(source: Stream, target: Stream, data: bytes) -> None:
    while data := data or await source.receive():
        await target.send(data)
        data = b""
    await target.end()
