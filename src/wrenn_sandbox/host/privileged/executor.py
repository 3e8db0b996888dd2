"""What the host agent does inside the namespaces of slots, named by intent."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.network.slot import AGENT_PORT, Slot
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.privileged.spawn import Identity, Output, spawn
from wrenn_sandbox.host.privileged.tap import attach_tap

LOOPBACK = "127.0.0.1"


def guest_address(slot: Slot, port: int = AGENT_PORT) -> tuple[str, int]:
    """Where `port` of the guest is reached: in user-mode networking only the agent's is."""
    if slot.host_port is None:
        return slot.guest_ip, port
    if port != AGENT_PORT:
        raise HostFailure("user-mode networking reaches only the guest agent")
    return LOOPBACK, slot.host_port


class NetnsExecutor:
    """Sockets, taps and processes inside slots. Close it when the last slot is gone."""

    def __init__(self) -> None:
        self._sockets = NamespaceThread("wrenn-sockets")
        self._processes = NamespaceThread("wrenn-processes")

    async def guest_socket(self, slot: Slot) -> socket.socket:
        """A non-blocking TCP socket that lives in the slot's namespace, not yet connected.

        Raises `HostFailure` when the slot is gone.
        """
        return await self._sockets.run(slot.netns, _tcp_socket)

    def guest_socket_sync(self, slot: Slot) -> socket.socket:
        """As `guest_socket`, for callers outside the event loop."""
        return self._sockets.run_sync(slot.netns, _tcp_socket)

    async def connect_guest(
        self, slot: Slot, port: int = AGENT_PORT, timeout: float = 5.0
    ) -> socket.socket:
        """A non-blocking TCP connection to a port of the guest, `TCP_NODELAY` set.

        Raises `OSError` as `connect` does, `TimeoutError` after `timeout` seconds, and
        `HostFailure` when the slot is gone.
        """
        address = guest_address(slot, port)
        connection = await self.guest_socket(slot)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(connection, address)
        except BaseException:
            connection.close()
            raise
        return connection

    async def open_tap(self, slot: Slot) -> int:
        """A descriptor of the slot's tap, not inheritable; see `attach_tap`."""
        if slot.tap is None:
            raise HostFailure("this slot has no tap")
        return await self._processes.run(slot.netns, partial(attach_tap, slot.tap))

    async def spawn_in_slot(
        self,
        slot: Slot,
        argv: Sequence[str],
        *,
        pass_fds: Collection[int] = (),
        stdout: Output = subprocess.DEVNULL,
        stderr: Output = subprocess.DEVNULL,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        groups: tuple[int, ...] = (),
    ) -> ProcessHandle:
        """Start a VMM in the slot's namespace as the slot's user; see `spawn`.

        `groups` are supplementary groups, such as the one that may open /dev/kvm.
        """
        work = partial(
            spawn,
            argv,
            identity=Identity(slot.uid, groups),
            pass_fds=pass_fds,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=env,
        )
        return await self._processes.run(slot.netns, work)

    def close(self) -> None:
        """End the two threads."""
        self._sockets.close()
        self._processes.close()


def kvm_groups(device: Path = Path("/dev/kvm")) -> tuple[int, ...]:
    """The group that may open /dev/kvm, for `spawn_in_slot`; empty when root alone may."""
    try:
        facts = os.stat(device)
    except OSError:
        return ()
    return (facts.st_gid,) if facts.st_gid != 0 and facts.st_mode & 0o060 == 0o060 else ()


def _tcp_socket() -> socket.socket:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
