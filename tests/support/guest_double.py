"""The guest side of the host in memory: files in a dictionary, commands with scripted output."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from wrenn_sandbox.errors import AgentError, Conflict, NotInGuest, WrennError
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import (
    Command,
    Ended,
    FileContent,
    FileEntry,
    FileType,
    ProcessEvent,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
    Unpacked,
)


class GuestDouble:
    """`files` holds what was written; `breaks_off` ends a download after its first piece."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fail: dict[str, WrennError | Exception] = {}
        self.breaks_off = False
        self.running: list[ProcessInfo] = []
        self.output: list[ProcessEvent] = [Ended(0)]
        self.signals: list[tuple[int | str | None, ProcessSignal]] = []

    async def enter_guest(self, call: str, sandbox_id: SandboxId) -> None:
        if call in self.fail:
            raise self.fail[call]

    @asynccontextmanager
    async def read_file(self, sandbox_id: SandboxId, path: str) -> AsyncIterator[FileContent]:
        await self.enter_guest("read_file", sandbox_id)
        if path not in self.files:
            raise NotInGuest("no such file")
        content = self.files[path]
        yield FileContent(len(content), self._pieces(content))

    async def _pieces(self, content: bytes) -> AsyncIterator[bytes]:
        half = len(content) // 2
        yield content[:half]
        if self.breaks_off:
            raise AgentError("The sandbox closed the connection.")
        yield content[half:]

    async def write_file(
        self,
        sandbox_id: SandboxId,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        await self.enter_guest("write_file", sandbox_id)
        self.files[path] = b"".join([chunk async for chunk in chunks])

    async def list_directory(self, sandbox_id: SandboxId, path: str, depth: int) -> list[FileEntry]:
        await self.enter_guest("list_directory", sandbox_id)
        return [_entry(each, FileType.FILE) for each in self.files]

    async def make_directory(
        self, sandbox_id: SandboxId, path: str, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        await self.enter_guest("make_directory", sandbox_id)
        if path in self.files:
            raise Conflict("it exists")
        return _entry(path, FileType.DIRECTORY)

    async def remove_path(self, sandbox_id: SandboxId, path: str) -> None:
        await self.enter_guest("remove_path", sandbox_id)
        if self.files.pop(path, None) is None:
            raise NotInGuest("no such file")

    @asynccontextmanager
    async def pack(
        self, sandbox_id: SandboxId, path: str, *, recursive: bool, user: str | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        await self.enter_guest("pack", sandbox_id)
        if path not in self.files:
            raise NotInGuest("no such file")
        yield self._pieces(self.files[path])

    async def unpack(
        self,
        sandbox_id: SandboxId,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        needs_directory: bool,
        user: str | None,
    ) -> Unpacked:
        await self.enter_guest("unpack", sandbox_id)
        self.files[path] = b"".join([chunk async for chunk in chunks])
        return Unpacked(entries=1)

    async def processes(self, sandbox_id: SandboxId) -> list[ProcessInfo]:
        await self.enter_guest("processes", sandbox_id)
        return list(self.running)

    @asynccontextmanager
    async def start_process(
        self,
        sandbox_id: SandboxId,
        command: Command,
        *,
        tag: str | None = None,
        stdin: bool = False,
        terminal: TerminalSize | None = None,
    ) -> AsyncIterator[ProcessStream]:
        await self.enter_guest("start_process", sandbox_id)
        yield ProcessStream(1000, self._said())

    async def start_detached(self, sandbox_id: SandboxId, command: Command, *, tag: str) -> int:
        await self.enter_guest("start_detached", sandbox_id)
        self.running.append(ProcessInfo(pid=1000, cmd=command.cmd, tag=tag))
        return 1000

    @asynccontextmanager
    async def attach_process(
        self, sandbox_id: SandboxId, process: ProcessRef, *, replay: bool
    ) -> AsyncIterator[ProcessStream]:
        await self.enter_guest("attach_process", sandbox_id)
        yield ProcessStream(1000, self._said())

    async def _said(self) -> AsyncIterator[ProcessEvent]:
        for event in self.output:
            yield event

    async def send_input(
        self, sandbox_id: SandboxId, pid: int, data: bytes, *, terminal: bool
    ) -> None:
        await self.enter_guest("send_input", sandbox_id)

    async def close_input(self, sandbox_id: SandboxId, pid: int) -> None:
        await self.enter_guest("close_input", sandbox_id)

    async def resize_terminal(self, sandbox_id: SandboxId, pid: int, size: TerminalSize) -> None:
        await self.enter_guest("resize_terminal", sandbox_id)

    async def signal_process(
        self, sandbox_id: SandboxId, process: ProcessRef, signal: ProcessSignal
    ) -> None:
        await self.enter_guest("signal_process", sandbox_id)
        self.signals.append((process.pid or process.tag, signal))


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
