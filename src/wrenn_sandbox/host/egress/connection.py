"""One connection of a guest's, and the one that the proxy makes in its place."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Final

CHUNK: Final = 16 * 1024
"""Bytes that are held at once of each direction."""
IDLE_SEC: Final = 600.0


class Denied(Exception):
    """The policy does not allow a name; `str()` is for the guest."""


class Unreachable(Exception):
    """A name that is allowed leads nowhere; `str()` is for the guest."""


Dial = Callable[["Connection", str, int], Awaitable[socket.socket]]


class Connection:
    """Ends where nothing was sent or received for `IDLE_SEC`.

    `name` is the host that it leads to, or is about to, and `address` where that is. Without a name
    it leads where the guest has called. Of one that is `inside` the proxy ends TLS.
    """

    def __init__(self, near: socket.socket, dial: Dial) -> None:
        self.near = near
        self.far: socket.socket | None = None
        self.name: str | None = None
        self.address: str | None = None
        self.inside = False
        self._dial = dial
        self._limit = asyncio.timeout(IDLE_SEC)

    async def serve(self, work: Callable[["Connection"], Awaitable[None]]) -> None:
        """Do the work, and close both sides. Raises OSError and `TimeoutError`."""
        try:
            async with self._limit:
                await work(self)
        finally:
            self.near.close()
            if self.far is not None:
                self.far.close()

    async def dial(self, name: str, port: int) -> socket.socket:
        """The far side, anew. Raises `Denied` and `Unreachable`."""
        if self.far is not None:
            self.far.close()
        self.far = await self._dial(self, name, port)
        return self.far

    async def receive(self, sock: socket.socket) -> bytes:
        await asyncio.sleep(0)  # what is ready is received and sent without giving way to others
        data = await asyncio.get_running_loop().sock_recv(sock, CHUNK)
        self._moved()
        return data

    def take(self, sock: socket.socket) -> bytes:
        """What is there to receive now; raises OSError, `BlockingIOError` for nothing."""
        data = sock.recv(CHUNK)
        self._moved()
        return data

    async def send(self, sock: socket.socket, data: bytes) -> None:
        await asyncio.sleep(0)
        await asyncio.get_running_loop().sock_sendall(sock, data)
        self._moved()

    def _moved(self) -> None:
        self._limit.reschedule(asyncio.get_running_loop().time() + IDLE_SEC)
