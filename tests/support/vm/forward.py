"""A port of this host that leads somewhere else, for clients that know only an address."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

_BUFFER = 1 << 16


@contextlib.asynccontextmanager
async def forwarding(
    port: int, connect: Callable[[], Awaitable[socket.socket]]
) -> AsyncIterator[None]:
    """While it lasts, each connection to `port` of this host is joined with one of `connect`.

    Raises `OSError` when the port is taken.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(_accept(listener, connect))
        try:
            yield
        finally:
            accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await accepting


async def _accept(listener: socket.socket, connect: Callable[[], Awaitable[socket.socket]]) -> None:
    async with asyncio.TaskGroup() as connections:
        while True:
            near, _ = await asyncio.get_running_loop().sock_accept(listener)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connections.create_task(_join(near, connect))


async def _join(near: socket.socket, connect: Callable[[], Awaitable[socket.socket]]) -> None:
    """Either side that goes away takes the other one along, as it would without us."""
    with near, await connect() as far:
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(_copy(near, far))
                directions.create_task(_copy(far, near))
        except* ConnectionError:
            pass


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _BUFFER):
        await loop.sock_sendall(target, data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
