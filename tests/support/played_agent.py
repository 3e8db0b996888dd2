"""A guest agent that plays a script on each connection, and the client of it."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.guest.processes import GuestProcesses
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import Command

_MB = 1 << 20


_COMMAND = Command(cmd="true")


Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def guest(play: Play) -> AsyncIterator[GuestClient]:
    """A client of a guest that does `play` on each connection."""

    playing = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        playing.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                await play(reader, writer)
                writer.close()
                await writer.wait_closed()
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()

    async def connect() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return sock

    client = GuestClient(connect, "token")
    try:
        yield client
    finally:
        client.close()
        server.close()
        await server.wait_closed()
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)
        await asyncio.sleep(0)


async def exec_in(client: GuestClient, timeout: float = 5.0) -> None:
    """Run a command; whatever the guest does, there is an end to it."""
    async with asyncio.timeout(timeout + patience(15)):
        await GuestProcesses(client).exec(_COMMAND, timeout=timeout, output_limit=4 * _MB)


def says(*parts: bytes) -> Play:
    """Sends these bytes and closes."""

    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return play


def floods(first: bytes, endless: bytes) -> Play:
    """Sends `first`, then the same again and again until the client has enough."""

    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while not writer.is_closing():
            writer.write(endless)
            await writer.drain()
            await asyncio.sleep(0)

    return play


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def frame(message: object, flags: int = 0) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">BI", flags, len(body)) + body
