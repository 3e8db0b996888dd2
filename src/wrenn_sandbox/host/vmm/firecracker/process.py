"""A Firecracker process: its start, its console, and calls that end when it does."""

import asyncio
import contextlib
import os
import signal
import stat
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from wrenn_sandbox.aio import first_of
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.memory.page_server import PageServer
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm.files import append, shorten_log, tail, tails
from wrenn_sandbox.patience import patience

from .api import Api

T = TypeVar("T")

CONSOLE_BYTES: Final = 64 * 1024
API_DIRECTORY: Final = "api"
API_SOCKET: Final = "api/socket"
"""As Firecracker is told, which starts in the machine's directory."""
_START_SEC: Final = 20.0
_STEP_SEC: Final = 0.001
_END_SEC: Final = 0.1
"""How long after a failed call the end of a process is seen at the latest."""
_EXITED_WELL: Final = b"Firecracker exiting successfully. exit_code=0"
"""The last line of its log when the guest reset its processor, which is how it ends a VM."""


@dataclass
class Running:
    """A process that Firecracker runs in, or ran: `handle` is None once it has ended."""

    handle: ProcessHandle | None
    api: Api
    files: MachineFiles
    console: int = -1
    """The end of its console that is read; -1 where there is none any more."""
    memory: Path | None = None
    """The image that its memory is over."""
    backing: Path | None = None
    """That image's memory as the process opens it, if it maps that."""
    record: Path | None = None
    """Where guest memory goes when it is stored whole."""
    pages: PageServer | None = None
    """What serves its memory, if that is not mapped."""
    lost: str = ""
    """Why it was ended while its guest ran."""
    ended: bool = False
    status: int | None = None
    """How it ended, if an earlier server had not started it."""
    _said_well: bool | None = None
    """What its log says of the end, once that has been read."""
    _heard: bytes = b""
    """What the guest wrote to its console and nobody has asked for yet."""
    _reading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def process(self) -> ProcessHandle:
        """Raises `HostFailure` where it has ended, so that its pid may be another's."""
        if self.handle is None or not self.handle.alive:
            raise HostFailure("The machine ended unexpectedly")
        return self.handle

    def keep_console(self) -> None:
        """Move what the guest has written from the pipe to a file of bounded length; blocks.

        What the file cannot take, as on a full disk, is lost.
        """
        with self._reading, contextlib.suppress(OSError):
            if self.console < 0:
                return
            shorten_log(self.files.console)
            if text := os.read(self.console, CONSOLE_BYTES):
                self._heard = (self._heard + text)[-CONSOLE_BYTES:]
                append(self.files.console, text)

    def take_console(self) -> bytes:
        """What the guest has written since the last call; blocks."""
        self.keep_console()
        with self._reading:
            text, self._heard = self._heard, b""
            return text

    def lose(self, reason: str) -> None:
        """Note that it has to be ended, also for a server that comes between; blocks."""
        self.lost = reason
        with contextlib.suppress(OSError):
            self.files.lost.write_text(reason, "utf-8")

    def ended_well(self) -> bool:
        """Whether all that the guest has written is on its disk; blocks.

        That is so where the guest ended the VM, and where the page server's end did: Firecracker
        then waited for a page. How a process ends which an earlier server started, its log alone
        says; it is asked once.
        """
        if self.lost:
            return True
        if self.status is not None:
            return self.status == 0
        if self.handle is not None and not self.ended:
            return False
        if self._said_well is None:
            self._said_well = False
            with contextlib.suppress(OSError):
                self._said_well = _EXITED_WELL in tail(self.files.vmm_log)
        return self._said_well

    def diagnosis(self) -> str:
        """The end of console and log; blocks."""
        self.keep_console()
        return tails(self.files)

    def close(self) -> None:
        """Let go of it; it runs on."""
        if self.pages is not None:
            self.pages.detach()
        if self.handle is not None:
            self.handle.close()
        with self._reading:
            if self.console >= 0:
                os.close(self.console)
                self.console = -1


async def until_end(running: Running, handle: ProcessHandle) -> None:
    """Wait for the end of a process, which that of its page server is as well."""
    if running.pages is None:
        running.status = await handle.wait()
    else:
        async with first_of(handle.wait(), running.pages.wait()) as (ended, lost):
            if not ended.done():
                await asyncio.to_thread(running.lose, lost.result())
                handle.signal(signal.SIGKILL)
            running.status = await ended
    running.ended = True


def known_loss(files: MachineFiles) -> str:
    """What an earlier server has noted of that; empty where it has not. Blocks."""
    try:
        return files.lost.read_text("utf-8", "replace")
    except OSError:
        return ""


def console_of(pid: int) -> int:
    """The end to read of a running process's console; -1 where that cannot be had. Blocks."""
    return read_end(f"/proc/{pid}/fd/1")


def read_end(path: str) -> int:
    """An end to read, its own and one that never blocks, of the pipe there; -1 where there is none.

    Another description of the same pipe is another's to change.
    """
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        if not stat.S_ISFIFO(os.fstat(found).st_mode):
            return -1
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1
    finally:
        os.close(found)


def make_api_directory(files: MachineFiles, slot: Slot) -> None:
    """Where Firecracker puts its socket, as its user; raises OSError. Blocks."""
    directory = files.directory / API_DIRECTORY
    directory.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(directory, slot.uid, slot.uid)


def seal_api_directory(files: MachineFiles) -> None:
    """Let a Firecracker that its guest takes over later make nothing there; raises OSError."""
    directory = files.directory / API_DIRECTORY
    if os.geteuid() == 0:
        os.chown(directory, 0, 0)
    directory.chmod(0o711)


async def listening(handle: ProcessHandle, api: Api) -> None:
    """Wait until a process that was just started takes calls; raises `HostFailure`."""

    async def there() -> None:
        while not await api.listens():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(_STEP_SEC)

    try:
        async with asyncio.timeout(patience(_START_SEC)):
            await unless_ended(handle, there(), "The machine did not start")
    except TimeoutError as error:
        late = f"no socket within {patience(_START_SEC):g} s"
        raise HostFailure("The machine did not start", detail=late) from error
    except OSError as error:
        raise HostFailure("The machine did not start", detail=str(error)) from error


async def unless_ended(
    handle: ProcessHandle,
    work: Coroutine[None, None, T],
    message: str = "The machine ended unexpectedly",
) -> T:
    """The result of calls; raises `HostFailure` with this message when the process ends first."""
    async with first_of(work, handle.wait()) as (task, ended):
        if not task.done() or isinstance(task.exception(), HostFailure):
            await asyncio.wait([ended], timeout=patience(_END_SEC))
            if ended.done():
                raise HostFailure(message, detail=f"Firecracker ended ({ended.result()})")
        return task.result()
