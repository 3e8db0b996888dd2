"""A QEMU process and its monitor: calls to it end when it does."""

import asyncio
import contextlib
import os
import stat
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

STATE_LIMIT: Final = 16 * 1024 * 1024
"""Bytes of device state; a machine's is some 13 KiB."""
LOG_LIMIT: Final = 1024 * 1024
"""Bytes of a monitor's own log; a guest can make it complain as often as it likes."""
_TAIL_BYTES: Final = 2000
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


def read_state(path: Path) -> bytes:
    """The device state that a monitor has written, however much that is; blocks.

    Raises OSError, also for what is no file or more than any machine's.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("the device state is not a file")
        data = file.read(STATE_LIMIT + 1)
    if not 0 < len(data) <= STATE_LIMIT:
        raise OSError(f"the device state has {len(data)} bytes or more")
    return data


def append(path: Path, text: bytes) -> None:
    """Add to a log file; blocks."""
    with open(path, "ab") as file:
        file.write(text)


def shorten_log(path: Path) -> None:
    """Empty a log that has grown too long, under the hands of its monitor; blocks."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            os.truncate(path, 0)


def tails(files: MachineFiles) -> str:
    """The end of what the monitor and the guest wrote, fit for a terminal; blocks."""
    context = []
    for path in (files.vmm_log, files.console):
        with contextlib.suppress(OSError):
            text = _shown(_end(path))
            if text:
                context.append(f"{path.name}: {text}")
    return "\n".join(context)


def _shown(data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    return "".join(each if each.isprintable() or each == "\n" else " " for each in text)


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        return file.read(_TAIL_BYTES)
