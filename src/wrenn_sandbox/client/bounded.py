"""What a stream does within a time limit, for asyncio and for threads.

Each pair does the same; `tools/make_sync_client.py` puts the second in the place of the first.
"""

import asyncio
import socket
import struct
import threading
from contextlib import suppress

from websockets.asyncio.client import ClientConnection as AsyncConnection
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection as Connection


async def async_receive(connection: AsyncConnection, seconds: float | None) -> str | bytes:
    """The next message; `TimeoutError` when none has come after `seconds`."""
    async with asyncio.timeout(seconds):
        return await connection.recv()


def receive(connection: Connection, seconds: float | None) -> str | bytes:
    """The next message; `TimeoutError` when none has come after `seconds`."""
    return connection.recv(seconds)


async def async_send(connection: AsyncConnection, message: str, seconds: float) -> bool:
    """Whether the message was sent within `seconds`, or need not be as the end has come."""
    try:
        async with asyncio.timeout(seconds):
            await connection.send(message)
    except TimeoutError:
        return False
    except (WebSocketException, OSError):
        return True
    return True


def send(connection: Connection, message: str, seconds: float) -> bool:
    """Whether the message was sent within `seconds`, or need not be as the end has come."""

    def run() -> None:
        with suppress(WebSocketException, OSError):
            connection.send(message)

    # Another thread may be stuck in a send to a server that does not read.
    sending = threading.Thread(target=run, name="send", daemon=True)
    sending.start()
    sending.join(seconds)
    return not sending.is_alive()


async def async_cut(connection: AsyncConnection) -> None:
    """End the connection at once, without a word."""
    _forget_unsent(connection.transport.get_extra_info("socket"))
    connection.transport.abort()


def cut(connection: Connection) -> None:
    """End the connection at once, without a word, and whatever is being sent on it."""
    _forget_unsent(connection.socket)
    with suppress(OSError):
        connection.socket.shutdown(socket.SHUT_RDWR)


def _forget_unsent(sock: socket.socket) -> None:
    """Let the close be a reset: else what nobody reads stands before the end for ever."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
