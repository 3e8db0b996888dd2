"""A QEMU process and its monitor: calls to it end when it does."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from wrenn_sandbox.aio import first_of
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.patience import patience

from .monitor import Monitor

T = TypeVar("T")

_END_SEC: Final = 0.1
"""How long after its connection the end of a process is seen at the latest."""
_REPLACED: Final = "An engine of this host is damaged: it is QEMU of another version"


@dataclass
class Running:
    """A process that QEMU runs in."""

    handle: ProcessHandle
    monitor: Monitor
    files: MachineFiles
    memory: Path | None = None
    """The image that its memory is a private mapping of."""
    private_memory: bool = False
    """No other machine maps that image."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the machine is stored, so that nothing lets it go on."""
    held: bool = False
    """It was stored and stands still until it is told to run on."""
    heard: bytes = b""
    """What the guest wrote to its console and nobody has asked for yet."""
    stopped: str | None = None
    """In which state it was adopted, where its guest had stopped before."""


async def connected(handle: ProcessHandle, path: Path, version: tuple[int, int, int]) -> Monitor:
    """The monitor of a process that was just started.

    Raises `HostFailure` when it ends first, does not answer in time or is a QEMU of another
    version.
    """
    monitor = await _or_end(handle, Monitor.connect(path), "The machine did not start")
    try:
        if monitor.version != version:
            raise HostFailure(_REPLACED)
    except BaseException:
        await monitor.close()
        raise
    return monitor


async def unless_ended(running: Running, work: Coroutine[None, None, T]) -> T:
    """The result of a call to the monitor; raises `HostFailure` when the process ends first."""
    return await _or_end(running.handle, work, "The machine ended unexpectedly")


async def _or_end(handle: ProcessHandle, work: Coroutine[None, None, T], message: str) -> T:
    """The result of a call to the monitor; a `HostFailure` with this message if QEMU ends."""
    async with first_of(work, handle.wait()) as (task, ended):
        if not task.done() or isinstance(task.exception(), HostFailure):
            await asyncio.wait([ended], timeout=patience(_END_SEC))
            if ended.done():
                status = "" if ended.result() is None else f" with status {ended.result()}"
                raise HostFailure(message, detail=f"QEMU ended{status}")
        return task.result()


async def or_no_end(work: Coroutine[None, None, str]) -> str:
    """The result of a wait on the monitor, or no end if the monitor is lost: the process tells."""
    try:
        return await work
    except Exception:
        await asyncio.get_running_loop().create_future()
        raise


async def end(running: Running) -> None:
    """Kill the process, wait for its end and let go of it."""
    try:
        await running.handle.kill()
    finally:
        running.handle.close()
        await running.monitor.close()


def require_same(running: Running) -> None:
    """Raise `HostFailure` where the process has ended, so that its pid may be another's."""
    if not running.handle.alive:
        raise HostFailure("The machine ended unexpectedly")
