"""The page server of one machine: the process that answers its page faults, seen from the server.

A driver starts it before the VMM, tells it which process the VMM is, and loads the snapshot with
the socket's path. It watches both from then on: a machine whose page server has ended must be
killed. The page server ends by itself with its machine, and outlives the server as that does.
"""

import asyncio
import contextlib
import functools
import importlib.util
import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec

from wrenn_sandbox.aio import first_of
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.paths import IMMUTABLE_FILE, MachineFiles
from wrenn_sandbox.host.privileged.jail import Jail, View
from wrenn_sandbox.host.privileged.limits import Limits
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.privileged.spawn import Output, spawn_in_slot
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.patience import patience

from . import diff, fault_handler
from .pages import PAGE, Mapping

T = TypeVar("T")

WORKING_SET: Final = "memory.set"
AROUND: Final = 16
"""Pages that a fault brings: 64 KiB."""
COMMAND: Final = (os.path.realpath(sys.executable), "-I", "-S")
"""How its command line begins; the program's descriptor and the socket's path follow."""
_PROGRAM: Final = Path(fault_handler.__file__)
_NONE: Final = -1
_ANSWER_SEC: Final = 10.0
_MESSAGE_LIMIT: Final = 256 * 1024
_MESSAGES: Final = 4
"""More than one that nobody has taken over sends at once."""
_WORD_LIMIT: Final = 500
_TOP: Final = 1 << 56
"""No process has memory above."""
_MB: Final = 1 << 20
_LIMITS: Final = Limits(files=64, file_size=_MB)
_LOST: Final = "The page server of the machine ended unexpectedly"


@dataclass(frozen=True)
class GuestMemory:
    """What a guest's memory is made of.

    `base` is the image, whose size is that of the guest's memory. `diff` is the directory of the
    pages that differ from it (`memory.idx`, `memory.diff`). `working_set` names the pages that the
    guest needs first; where there is no such file, or a wrong one, nothing is given in advance.
    """

    base: Path
    diff: Path | None = None
    working_set: Path | None = None


class _Note(msgspec.Struct, frozen=True):
    """The process, for a later server, and the regions of memory that it serves."""

    pid: int
    start_time: int
    regions: tuple[tuple[int, int, int], ...] = ()


class PageServer:
    """Close it once its machine has ended, or `detach` it so that both run on."""

    def __init__(
        self,
        handle: ProcessHandle,
        files: MachineFiles,
        control: socket.socket | None = None,
        pages: int = 0,
    ) -> None:
        self._handle = handle
        self._files = files
        self._control = control
        self._pages = pages
        self._serving = asyncio.Event()
        self._regions: tuple[tuple[int, int, int], ...] = ()
        self._recorded: asyncio.Future[bytes] | None = None
        self._last_word = ""
        self._closed = False
        if control is not None:
            asyncio.get_running_loop().add_reader(control, self._hear)

    @classmethod
    async def start(
        cls,
        slot: Slot,
        files: MachineFiles,
        memory: GuestMemory,
        *,
        jail: Jail | None = None,
        group: int | None = None,
        output: Output = subprocess.DEVNULL,
        around: int = AROUND,
    ) -> Self:
        """Start one that listens on the machine's `pages_socket`, as the slot's user.

        It sees no file of the data directory. `group` is a descriptor of the machine's control
        group. With `around` 1 a fault brings one page: slower, and the recorded working set is
        exactly what the guest has touched. Raises `HostFailure`; nothing runs then.
        """
        opening = asyncio.create_task(asyncio.to_thread(_opened, files, memory, slot.uid))
        try:
            passed = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise
        except OSError as error:
            raise HostFailure("The page server cannot be started", detail=str(error)) from error
        try:
            named = (str(files.pages_socket), str(around), *map(str, passed.served))
            handle = await spawn_in_slot(
                slot,
                [*COMMAND, f"/proc/self/fd/{passed.program}", *named],
                jail=jail,
                view=View(),
                group=group,
                limits=_LIMITS,
                pass_fds=[fd for fd in (passed.program, *passed.served) if fd != _NONE],
                output=output,
            )
            server = cls(handle, files, passed.control.dup(), passed.pages)
        finally:
            passed.close()
        try:
            await asyncio.to_thread(server._note)
        except BaseException as error:
            await asyncio.shield(server.close())
            if isinstance(error, OSError):
                raise HostFailure("The page server is not noted", detail=str(error)) from error
            raise
        return server

    @classmethod
    async def adopt(cls, files: MachineFiles) -> Self | None:
        """That of a machine which an earlier server started; None where there is none any more."""
        try:
            data = await asyncio.to_thread(files.page_server.read_bytes)
            note = msgspec.json.decode(data, type=_Note)
            handle = ProcessHandle.adopt(note.pid, note.start_time)
        except (OSError, msgspec.DecodeError):
            return None
        server = cls(handle, files)
        server._regions = note.regions
        return server

    def mappings(self, machine: int, size: int) -> list[Mapping]:
        """Where the memory that is served, `size` bytes, is in the machine of that pid, in order.

        Raises LookupError where that is not known, or cannot be.
        """
        found, next_page = [], 0
        for first, end, address in sorted(self._regions):
            if not next_page == first < end or address % PAGE or address >= _TOP:
                break
            found.append(Mapping(machine, address, address + (end - first) * PAGE, first))
            next_page = end
        if len(found) != len(self._regions) or next_page * PAGE != size:
            raise LookupError("the page server has not said what it serves")
        return found

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._handle.pid

    def serve(self, machine: ProcessHandle) -> None:
        """Say which process the VMM is; nothing is served before. Raises `HostFailure`."""
        pidfd = machine.duplicate()
        try:
            self._say(fault_handler.MACHINE, pidfd)
        finally:
            os.close(pidfd)

    async def connected(self) -> None:
        """Wait until the VMM has handed its memory over; raises `HostFailure` with the reason.

        Waits as long as it takes: for a VMM that ends first, wait beside it.
        """
        await self.unless_ended(self._serving.wait())
        try:
            await asyncio.to_thread(self._note)
        except OSError as error:
            raise HostFailure("The page server is not noted", detail=str(error)) from error

    async def unless_ended(self, work: Coroutine[None, None, T]) -> T:
        """The result of `work`; raises `HostFailure` with the reason when this ends first."""
        async with first_of(work, self.wait()) as (task, ended):
            if ended.done():
                raise HostFailure(_LOST, detail=ended.result())
            return task.result()

    def _note(self) -> None:
        note = _Note(self._handle.pid, self._handle.start_time, self._regions)
        new = self._files.page_server.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(note))
        new.replace(self._files.page_server)

    async def wait(self) -> str:
        """Wait for the end of the page server; what is known of the reason."""
        status = await self._handle.wait()
        self._hear()
        reason = "the page server ended" + ("" if status is None else f" ({status})")
        return f"{reason}: {self._last_word}" if self._last_word else reason

    async def record(self, into: Path) -> None:
        """End the recording of the working set and keep it as this file; once, for its starter.

        It is a hint, so nothing is synced. Raises `HostFailure`.
        """
        self._recorded = asyncio.get_running_loop().create_future()
        self._say(fault_handler.STOP)
        try:
            async with (
                asyncio.timeout(patience(_ANSWER_SEC)),
                first_of(self._recorded, self._handle.wait()) as (recorded, _),
            ):
                if not recorded.done():
                    raise HostFailure(_LOST)
                data = recorded.result()
            fault_handler.decode_set(data, self._pages)
            await asyncio.to_thread(_keep, into, data)
        except (OSError, ValueError, TimeoutError) as error:
            raise HostFailure("The working set is not kept", detail=str(error)) from error

    async def close(self) -> None:
        """End it at once and wait for its end; no effect once it is closed or detached."""
        if self._closed:
            return
        try:
            await self._handle.kill()
        finally:
            self.detach()
            self._files.pages_socket.unlink(missing_ok=True)

    def detach(self) -> None:
        """Let go of it; it runs on as long as its machine. Safe to repeat."""
        self._closed = True
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        self._handle.close()

    def _say(self, message: bytes, *fds: int) -> None:
        if self._control is None:
            raise HostFailure("The page server was started by another server")
        try:
            socket.send_fds(self._control, [message], fds)
        except OSError as error:
            raise HostFailure(_LOST, detail=self._last_word or str(error)) from error

    def _hear(self) -> None:
        """Take in what it has said, so much at once that the server has time for others."""
        if self._control is None:
            return
        try:
            for _ in range(_MESSAGES):
                if not (message := self._control.recv(_MESSAGE_LIMIT)):
                    break
                self._take(message)
            else:
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self._control)

    def _take(self, message: bytes) -> None:
        if message.startswith(fault_handler.SERVING):
            self._regions = _regions(message[len(fault_handler.SERVING) :])
            self._serving.set()
        elif message.startswith(fault_handler.FAILED):
            word = message[len(fault_handler.FAILED) :][:_WORD_LIMIT]
            self._last_word = word.decode("utf-8", "replace")
        elif self._recorded is not None and not self._recorded.done():
            self._recorded.set_result(message)


@dataclass(frozen=True)
class _Passed:
    """The descriptors that the process is given, in the order of its arguments, and this end of
    the line to it."""

    program: int
    served: tuple[int, ...]
    control: socket.socket
    pages: int
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


def _regions(text: bytes) -> tuple[tuple[int, int, int], ...]:
    """Triples of numbers, nothing where it says anything else; in no order."""
    numbers = [int(each) for each in text.split() if each.isdigit() and len(each) < 20]
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=False))


def _opened(files: MachineFiles, memory: GuestMemory, uid: int) -> _Passed:
    """Everything that the process is given; blocks. Raises OSError."""
    with ExitStack() as stack:

        def opened(path: Path | None) -> int:
            if path is None:
                return _NONE
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        base = opened(memory.base)
        index = opened(memory.diff and memory.diff / diff.INDEX)
        pages = opened(memory.diff and memory.diff / diff.PAGES)
        working_set = _NONE
        with contextlib.suppress(FileNotFoundError):
            working_set = opened(memory.working_set)
        listener = stack.enter_context(_listening(files.pages_socket, uid))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(ours.close)
        stack.callback(theirs.close)
        ours.setblocking(False)
        program = os.memfd_create("wrenn-page-server", os.MFD_CLOEXEC)
        stack.callback(os.close, program)
        os.write(program, _program())
        served = (listener.fileno(), theirs.fileno(), base, index, pages, working_set)
        size = os.fstat(base).st_size // fault_handler.PAGE
        return _Passed(program, served, ours, size, stack.pop_all())


def _listening(path: Path, uid: int) -> socket.socket:
    """A socket that the VMM can connect to."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o600)
        if os.geteuid() == 0:
            os.chown(path, uid, uid)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


@functools.cache
def _program() -> bytes:
    """The program as the interpreter's own compiled form: to compile it at each start takes longer
    than all else that it does."""
    code = compile(_PROGRAM.read_bytes(), _PROGRAM.name, "exec")
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _keep(path: Path, data: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    new.chmod(IMMUTABLE_FILE)
    new.replace(path)


def _close_unwanted(opening: "asyncio.Future[_Passed]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
