"""A connection to a port of a guest: bytes both ways, through the guest's agent or without it."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from typing import Final, TypeVar

from wrenn_sandbox.errors import AgentError, Conflict, PortNotOpen
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.guest import AGENT_PORT

from .connection import ANSWER_SEC, CLOSED, SILENT, Connect, GuestGone, GuestUnreachable

T = TypeVar("T")

_PROTOCOL: Final = "wrenn-tunnel"
_PIECE: Final = 64 * 1024
"""Bytes read at once; a connection whose client takes nothing holds about four times as much."""


class Tunnel:
    """One such connection; `close` cuts it, whatever is under way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._failure: BaseException | None = None

    @classmethod
    async def open(cls, connect: Connect) -> "Tunnel":
        """A connection to the agent itself; raises `GuestUnreachable`."""
        try:
            sock = await connect()
        except OSError as error:
            raise GuestUnreachable(SILENT, detail=f"connect: {error}") from error
        try:
            reader, writer = await asyncio.open_connection(sock=sock, limit=_PIECE)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer)

    async def lead_to(
        self, port: int, credentials: Mapping[str, str], *, or_direct: bool = False
    ) -> bool:
        """Have the agent go on with another port.

        With `or_direct` it may have the caller connect to that port instead: then False.
        Raises `PortNotOpen`, `AgentError`, and `Conflict` where the agent knows no tunnels.
        """
        if port == AGENT_PORT:
            return True
        headers = {"Host": "guest", "Connection": "Upgrade", "Upgrade": _PROTOCOL, **credentials}
        if or_direct:
            headers["Direct"] = "yes"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._writer.write(f"GET /tunnel?port={port} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
        status = await self._status()
        if status == b"101":
            return True
        if or_direct and status == b"204":
            return False
        raise _refusal(port, status)

    async def _status(self) -> bytes:
        try:
            async with asyncio.timeout(patience(ANSWER_SEC)):
                head = await self._reader.readuntil(b"\r\n\r\n")
        except TimeoutError as error:
            raise GuestGone(SILENT, detail="no answer to a tunnel") from error
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise self._gone(str(error)) from error
        return head[:12].removeprefix(b"HTTP/1.1 ")

    async def carry(self, sent: AsyncIterator[bytes]) -> None:
        """Send all of `sent`, then close this direction; what it raises breaks the connection.

        A generator is closed then, so that it learns of an end that is not its own.
        """
        try:
            async for piece in sent:
                self._writer.write(piece)
                await self._writer.drain()
            self._writer.write_eof()
        except OSError as error:
            self._break(self._gone(str(error)))
        except Exception as error:
            self._break(error)
        finally:
            if isinstance(sent, AsyncGenerator):
                await sent.aclose()

    async def pieces(self) -> AsyncIterator[bytes]:
        """What comes back, as it comes; raises what has broken the connection."""
        while True:
            try:
                piece = await self._reader.read(_PIECE)
            except OSError as error:
                raise self._gone(str(error)) from error
            if self._failure is not None:
                raise self._failure
            if not piece:
                return
            yield piece

    def close(self) -> None:
        self._break(GuestGone(CLOSED, detail="closed here"))

    def _gone(self, detail: str) -> BaseException:
        return self._failure or GuestGone(CLOSED, detail=detail)

    def _break(self, failure: BaseException) -> None:
        """A broken connection's end looks like any other to its reader."""
        if self._failure is None:
            self._failure = failure
        self._writer.transport.abort()


class DirectTunnel:
    """A connection that the agent has no part in, otherwise as `Tunnel`.

    A program may answer and close before it has read all that it is sent: the rest is dropped, as
    the agent does, and the answer still read. So each direction has its own end.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._failure: BaseException | None = None
        self._pending = 0
        self._closed = False

    @classmethod
    async def open(cls, connect: Connect) -> "DirectTunnel":
        """A connection as `connect` makes it; raises `GuestUnreachable`."""
        try:
            return cls(await connect())
        except OSError as error:
            raise GuestUnreachable(SILENT, detail=f"connect: {error}") from error

    async def carry(self, sent: AsyncIterator[bytes]) -> None:
        refused = False
        try:
            async for piece in sent:
                if not refused:
                    try:
                        await self._waiting(self._loop.sock_sendall(self._sock, piece))
                    except OSError:
                        refused = True
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        except Exception as error:
            self._break(error)
        finally:
            if isinstance(sent, AsyncGenerator):
                await sent.aclose()

    async def pieces(self) -> AsyncIterator[bytes]:
        while True:
            try:
                piece = await self._waiting(self._loop.sock_recv(self._sock, _PIECE))
            except OSError as error:
                raise self._failure or GuestGone(CLOSED, detail=str(error)) from error
            if self._failure is not None:
                raise self._failure
            if not piece:
                return
            yield piece

    def close(self) -> None:
        self._break(GuestGone(CLOSED, detail="closed here"))
        self._closed = True
        self._release()

    def _break(self, failure: BaseException) -> None:
        if self._failure is None:
            self._failure = failure
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    async def _waiting(self, work: Awaitable[T]) -> T:
        """What somebody waits for must not be closed: the number may be another socket's then."""
        self._pending += 1
        try:
            return await work
        finally:
            self._pending -= 1
            self._release()

    def _release(self) -> None:
        if self._closed and not self._pending:
            self._sock.close()


def _refusal(port: int, status: bytes) -> AgentError | Conflict | PortNotOpen:
    if status == b"412":
        return PortNotOpen(f"The port is not open: nothing listens on port {port} in the sandbox")
    if status == b"504":
        return PortNotOpen(f"The port is not open: port {port} accepts no connection")
    if status == b"404":
        return Conflict(
            "The guest's agent is too old to reach ports; pause the sandbox and resume it with"
            ' "memory": false'
        )
    return AgentError("The sandbox cannot reach its ports", detail=f"tunnel status {status!r}")
