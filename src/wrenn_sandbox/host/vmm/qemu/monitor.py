"""QMP: what this driver says to a running QEMU, in its own words."""

import asyncio
import base64
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from qemu.qmp import QMPClient, QMPError

from wrenn_sandbox.errors import HostFailure

from .command import CONSOLE, CONSOLE_BYTES

LISTEN_BACKLOG: Final = 4


def listen(path: Path) -> socket.socket:
    """The listening socket that QEMU takes over, so that a client can connect before it runs."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with short_path(path) as name:
            listener.bind(name)
        os.chmod(path, 0o600)
        listener.listen(LISTEN_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a socket that fits the 107 bytes the kernel allows, whatever its directory."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class Monitor:
    """A QMP session. Every method raises `HostFailure` where QEMU refuses or is gone."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, timeout: float = 10.0) -> Self:
        """Open a session; QEMU answers as soon as its main loop runs."""
        client = QMPClient()
        client.logger.disabled = True
        try:
            async with asyncio.timeout(timeout):
                with short_path(path) as name:
                    await client.connect(name)
        except TimeoutError as error:
            with contextlib.suppress(QMPError):
                await client.disconnect()
            raise HostFailure("The machine's monitor does not answer.") from error
        except QMPError as error:
            raise HostFailure("The machine did not start.", detail=f"QMP: {error}") from error
        return cls(client)

    async def close(self) -> None:
        """End the session; the machine runs on."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    async def load(self, vmstate_fd: int) -> None:
        """Load device state from a descriptor that QEMU was started with, and let it run."""
        with self._client.listener(("RESUME", "SHUTDOWN")) as events:
            await self._execute("migrate-incoming", {"uri": f"fd:{vmstate_fd}"})
            event = await events.get()
        if event.get("event") != "RESUME":
            raise HostFailure("The stored machine did not start.", detail=str(event))

    async def save(self, vmstate: Path) -> None:
        """Write the device state of a stopped machine to a new file."""
        await self._execute("xen-save-devices-state", {"filename": str(vmstate), "live": False})

    async def stop(self) -> None:
        await self._execute("stop")

    async def cont(self) -> None:
        await self._execute("cont")

    async def status(self) -> str:
        """QEMU's run state: running, paused, shutdown, ..."""
        reply = await self._execute("query-status")
        return str(reply.get("status", "")) if isinstance(reply, dict) else ""

    async def version(self) -> str:
        """Major, minor and micro of the running QEMU."""
        greeting = self._client.greeting
        if greeting is None:
            return ""
        version = greeting.QMP.version
        qemu = version.get("qemu", {}) if isinstance(version, dict) else {}
        return ".".join(str(qemu.get(part, "?")) for part in ("major", "minor", "micro"))

    async def console(self) -> bytes:
        """What the guest wrote to its console since the last call, the last 64 KiB at most."""
        reply = await self._execute(
            "ringbuf-read", {"device": CONSOLE, "size": CONSOLE_BYTES, "format": "base64"}
        )
        return base64.b64decode(str(reply))

    async def shutdown(self) -> str:
        """Wait until the guest shuts down, resets or panics; returns which."""
        with self._client.listener(("SHUTDOWN", "GUEST_PANICKED")) as events:
            event = await events.get()
        data = event.get("data", {})
        reason = data.get("reason", "") if isinstance(data, dict) else ""
        return f"{event.get('event')} {reason}".strip()

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        try:
            return await self._client.execute(command, arguments)
        except QMPError as error:
            raise HostFailure(
                "The machine's monitor refused or is gone.", detail=f"{command}: {error}"
            ) from error
