"""The way to a guest: sockets made inside its slot, so no guest port appears on the host."""

import asyncio
import socket

from wrenn_sandbox.host.slot import PORT_MARK, Slot
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.guest import AGENT_PORT

from .netns import NamespaceThread

LOOPBACK = "127.0.0.1"
_CONNECT_SEC = 5.0


async def guest_socket(namespaces: NamespaceThread, slot: Slot) -> socket.socket:
    """A non-blocking TCP socket that lives in the slot's namespace, not yet connected.

    `TCP_NODELAY` is set. Raises `HostFailure` when the slot is gone.
    """
    making = asyncio.create_task(namespaces.run(slot.netns, _tcp_socket))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_close_unwanted)
        raise


async def connect_guest(
    namespaces: NamespaceThread, slot: Slot, guest_port: int = AGENT_PORT
) -> socket.socket:
    """A non-blocking TCP connection to the guest's agent, or to another port of its.

    That needs a slot with a namespace. Raises `OSError` as `connect` does, `TimeoutError` after
    five seconds, and `HostFailure` when the slot is gone.
    """
    connection = await guest_socket(namespaces, slot)
    try:
        if slot.host_port is None:
            address = (slot.guest_ip, guest_port)
            if guest_port != AGENT_PORT:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PORT_MARK)
        else:
            assert guest_port == AGENT_PORT
            address = (LOOPBACK, slot.host_port)
        async with asyncio.timeout(patience(_CONNECT_SEC)):
            await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


def _close_unwanted(making: "asyncio.Task[socket.socket]") -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()


def _tcp_socket() -> socket.socket:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
