"""The guest side of the host in memory: files in a dictionary, commands with scripted output."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from wrenn_sandbox.errors import AgentError, Conflict, NotInGuest, PortNotOpen, WrennError
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import (
    Command,
    CommandResult,
    Ended,
    FileContent,
    FileEntry,
    FileType,
    GuestMetrics,
    ProcessEvent,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
    Unpacked,
)

Port = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]
"""What a program on a port makes of what it is sent."""


class GuestState:
    """`files` holds what was written; `breaks_off` ends a download after its first piece.

    `ports` are open in every guest.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fail: dict[str, WrennError | Exception] = {}
        self.breaks_off = False
        self.running: list[ProcessInfo] = []
        self.output: list[ProcessEvent] = [Ended(0)]
        self.signals: list[tuple[int | str | None, ProcessSignal]] = []
        self.ports: dict[int, Port] = {}

    async def enter_guest(self, call: str, sandbox_id: SandboxId) -> None:
        if call in self.fail:
            raise self.fail[call]

    async def run(self, command: Command) -> CommandResult:
        raise AgentError("no command runs here")


class GuestDouble:
    """Implements `Guest` for one sandbox, over what all share."""

    def __init__(self, state: GuestState, sandbox_id: SandboxId) -> None:
        self._state = state
        self._id = sandbox_id

    async def _enter(self, call: str) -> None:
        await self._state.enter_guest(call, self._id)

    async def health(self) -> None:
        await self._enter("health")

    async def metrics(self) -> GuestMetrics:
        await self._enter("metrics")
        return GuestMetrics(
            cpu_count=1,
            cpu_used_pct=0.0,
            mem_total=1,
            mem_used=1,
            mem_cache=0,
            disk_used=1,
            disk_total=1,
        )

    async def exec(self, command: Command, *, timeout: float, output_limit: int) -> CommandResult:
        await self._enter("exec")
        return await self._state.run(command)

    @asynccontextmanager
    async def read_file(self, path: str) -> AsyncIterator[FileContent]:
        await self._enter("read_file")
        if path not in self._state.files:
            raise NotInGuest("no such file")
        content = self._state.files[path]
        yield FileContent(len(content), self._pieces(content))

    async def _pieces(self, content: bytes) -> AsyncIterator[bytes]:
        half = len(content) // 2
        yield content[:half]
        if self._state.breaks_off:
            raise AgentError("The sandbox closed the connection")
        yield content[half:]

    async def write_file(
        self,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        await self._enter("write_file")
        self._state.files[path] = b"".join([chunk async for chunk in chunks])

    async def list_directory(self, path: str, depth: int) -> list[FileEntry]:
        await self._enter("list_directory")
        return [_entry(each, FileType.FILE) for each in self._state.files]

    async def make_directory(
        self, path: str, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        await self._enter("make_directory")
        if path in self._state.files:
            raise Conflict("it exists")
        return _entry(path, FileType.DIRECTORY)

    async def remove_path(self, path: str) -> None:
        await self._enter("remove_path")
        if self._state.files.pop(path, None) is None:
            raise NotInGuest("no such file")

    @asynccontextmanager
    async def pack(
        self, path: str, *, recursive: bool, user: str | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        await self._enter("pack")
        if path not in self._state.files:
            raise NotInGuest("no such file")
        yield self._pieces(self._state.files[path])

    async def unpack(
        self,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        needs_directory: bool,
        user: str | None,
    ) -> Unpacked:
        await self._enter("unpack")
        self._state.files[path] = b"".join([chunk async for chunk in chunks])
        return Unpacked(entries=1)

    async def processes(self) -> list[ProcessInfo]:
        await self._enter("processes")
        return list(self._state.running)

    @asynccontextmanager
    async def start_process(
        self,
        command: Command,
        *,
        tag: str | None = None,
        stdin: bool = False,
        terminal: TerminalSize | None = None,
    ) -> AsyncIterator[ProcessStream]:
        await self._enter("start_process")
        yield ProcessStream(1000, self._said())

    async def start_detached(self, command: Command, *, tag: str) -> int:
        await self._enter("start_detached")
        self._state.running.append(ProcessInfo(pid=1000, cmd=command.cmd, tag=tag))
        return 1000

    @asynccontextmanager
    async def attach_process(
        self, process: ProcessRef, *, replay: bool
    ) -> AsyncIterator[ProcessStream]:
        await self._enter("attach_process")
        yield ProcessStream(1000, self._said())

    async def _said(self) -> AsyncIterator[ProcessEvent]:
        for event in self._state.output:
            yield event

    async def send_input(self, pid: int, data: bytes, *, terminal: bool) -> None:
        await self._enter("send_input")

    async def close_input(self, pid: int) -> None:
        await self._enter("close_input")

    async def resize_terminal(self, pid: int, size: TerminalSize) -> None:
        await self._enter("resize_terminal")

    async def signal_process(self, process: ProcessRef, signal: ProcessSignal) -> None:
        await self._enter("signal_process")
        self._state.signals.append((process.pid or process.tag, signal))

    @asynccontextmanager
    async def connect(
        self, port: int, sent: AsyncIterator[bytes]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        await self._enter("connect")
        if port not in self._state.ports:
            raise PortNotOpen("The port is not open: nothing listens there")
        yield self._state.ports[port](sent)

    async def agent_token(self) -> str:
        await self._enter("agent_token")
        return f"token of {self._id}"


def _entry(path: str, kind: FileType) -> FileEntry:
    return FileEntry(
        name=path.rpartition("/")[2],
        path=path,
        type=kind,
        size=0,
        mode=0o644,
        permissions="-rw-r--r--",
        owner="root",
        group="root",
        modified_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
