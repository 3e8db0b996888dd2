"""The way to a guest: sockets made inside its slot, so no guest port appears on the host."""

import asyncio
import socket

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.slot import AGENT_PORT, Slot

from .netns import NamespaceThread

LOOPBACK = "127.0.0.1"


def guest_address(slot: Slot, port: int = AGENT_PORT) -> tuple[str, int]:
    """Where `port` of the guest is reached: in user-mode networking only the agent's is."""
    if slot.host_port is None:
        return slot.guest_ip, port
    if port != AGENT_PORT:
        raise HostFailure("User-mode networking reaches only the guest agent")
    return LOOPBACK, slot.host_port


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
    namespaces: NamespaceThread, slot: Slot, port: int = AGENT_PORT, timeout: float = 5.0
) -> socket.socket:
    """A non-blocking TCP connection to a port of the guest.

    Raises `OSError` as `connect` does, `TimeoutError` after `timeout` seconds, and
    `HostFailure` when the slot is gone.
    """
    address = guest_address(slot, port)
    connection = await guest_socket(namespaces, slot)
    try:
        async with asyncio.timeout(timeout):
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
