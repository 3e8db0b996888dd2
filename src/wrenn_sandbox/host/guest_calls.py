"""The calls of the Host interface that go straight to a guest."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from wrenn_sandbox.errors import NotResponding
from wrenn_sandbox.host.guest.archives import GuestArchives
from wrenn_sandbox.host.guest.files import GuestFiles
from wrenn_sandbox.host.guest.streams import GuestProcesses
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import (
    Command,
    CommandResult,
    FileContent,
    FileEntry,
    GuestMetrics,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
    Unpacked,
)

from .guest import GuestClient, GuestUnreachable


class GuestCalls(ABC):
    """Every call raises `NotFound` where the sandbox does not run here."""

    @abstractmethod
    def _client(self, sandbox_id: SandboxId) -> GuestClient:
        """Calls to a running guest."""

    async def exec(
        self, sandbox_id: SandboxId, command: Command, *, timeout: float, output_limit: int
    ) -> CommandResult:
        client = self._client(sandbox_id)
        return await client.exec(command, timeout=timeout, output_limit=output_limit)

    async def health(self, sandbox_id: SandboxId) -> None:
        try:
            await self._client(sandbox_id).answer()
        except GuestUnreachable as error:
            raise NotResponding("The guest cannot be reached.", detail=error.detail) from error

    async def metrics(self, sandbox_id: SandboxId) -> GuestMetrics:
        return await self._client(sandbox_id).metrics()

    @asynccontextmanager
    async def read_file(self, sandbox_id: SandboxId, path: str) -> AsyncIterator[FileContent]:
        async with self._files(sandbox_id).read(path) as content:
            yield content

    async def write_file(
        self,
        sandbox_id: SandboxId,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        user: str | None = None,
        mode: int | None = None,
    ) -> None:
        await self._files(sandbox_id).write(path, chunks, user, mode)

    async def list_directory(self, sandbox_id: SandboxId, path: str, depth: int) -> list[FileEntry]:
        return await self._files(sandbox_id).list(path, depth)

    async def make_directory(
        self, sandbox_id: SandboxId, path: str, *, user: str | None = None, mode: int | None = None
    ) -> FileEntry:
        return await self._files(sandbox_id).make_directory(path, user, mode)

    async def remove_path(self, sandbox_id: SandboxId, path: str) -> None:
        await self._files(sandbox_id).remove(path)

    @asynccontextmanager
    async def pack(
        self, sandbox_id: SandboxId, path: str, *, recursive: bool, user: str | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        archives = GuestArchives(self._client(sandbox_id))
        async with archives.pack(path, recursive=recursive, user=user) as chunks:
            yield chunks

    async def unpack(
        self,
        sandbox_id: SandboxId,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        needs_directory: bool,
        user: str | None,
    ) -> Unpacked:
        return await GuestArchives(self._client(sandbox_id)).unpack(
            path, chunks, needs_directory=needs_directory, user=user
        )

    async def processes(self, sandbox_id: SandboxId) -> list[ProcessInfo]:
        return await self._processes(sandbox_id).list()

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
        processes = self._processes(sandbox_id)
        async with processes.start(command, tag=tag, stdin=stdin, terminal=terminal) as stream:
            yield stream

    async def start_detached(self, sandbox_id: SandboxId, command: Command, *, tag: str) -> int:
        return await self._processes(sandbox_id).start_detached(command, tag=tag)

    @asynccontextmanager
    async def attach_process(
        self, sandbox_id: SandboxId, process: ProcessRef, *, replay: bool
    ) -> AsyncIterator[ProcessStream]:
        async with self._processes(sandbox_id).attach(process, replay=replay) as stream:
            yield stream

    async def send_input(
        self, sandbox_id: SandboxId, pid: int, data: bytes, *, terminal: bool
    ) -> None:
        await self._processes(sandbox_id).send_input(pid, data, terminal=terminal)

    async def close_input(self, sandbox_id: SandboxId, pid: int) -> None:
        await self._processes(sandbox_id).close_input(pid)

    async def resize_terminal(self, sandbox_id: SandboxId, pid: int, size: TerminalSize) -> None:
        await self._processes(sandbox_id).resize(pid, size)

    async def signal_process(
        self, sandbox_id: SandboxId, process: ProcessRef, signal: ProcessSignal
    ) -> None:
        await self._processes(sandbox_id).signal(process, signal)

    def _files(self, sandbox_id: SandboxId) -> GuestFiles:
        return GuestFiles(self._client(sandbox_id))

    def _processes(self, sandbox_id: SandboxId) -> GuestProcesses:
        return GuestProcesses(self._client(sandbox_id))
