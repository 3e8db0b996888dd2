"""What a team can do inside its running sandboxes: files, commands, terminals."""

import asyncio
import re
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass

from wrenn_sandbox.control.store import Store
from wrenn_sandbox.errors import AgentError, Conflict, InvalidRequest, NotFound, NotInGuest
from wrenn_sandbox.ids import Random, SandboxId, TeamId, new_tag
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.wire.host import Host
from wrenn_sandbox.wire.messages import (
    Channel,
    Command,
    FileContent,
    FileEntry,
    GuestMetrics,
    Output,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
    Unpacked,
)

from .activity import Activity
from .calls import ConcurrencyLimiter, checked_command
from .guest_health import GuestHealth
from .lifecycle import Wakeups, not_possible
from .sandboxes import as_agent_error, sandbox_id_of

SPOOLS_PER_SANDBOX = 4
SPOOLS_PER_TEAM = 16
"""Uploads of which the server keeps up to 100 MiB each, until it knows where they go."""

_DOUBTFUL_SEC = 1.0
"""After so long without metrics the guest is asked whether it is there at all."""

PATH_LIMIT = 4096
"""Bytes of a path, as in Linux."""

USER_LIMIT = 256
"""Characters of a user's name; Linux has 32."""


@dataclass(frozen=True, slots=True)
class Guest:
    """One running sandbox; calls raise what `Host` says of them."""

    host: Host
    id: SandboxId

    def read_file(self, path: str) -> AbstractAsyncContextManager[FileContent]:
        return self.host.read_file(self.id, checked_path(path))

    async def write_file(
        self, path: str, chunks: AsyncIterator[bytes], *, user: str | None, mode: int | None
    ) -> None:
        path = checked_path(path)
        await self.host.write_file(self.id, path, chunks, user=user, mode=mode)

    async def list_directory(self, path: str, depth: int) -> list[FileEntry]:
        return await self.host.list_directory(self.id, checked_path(path), depth)

    async def make_directory(self, path: str, *, user: str | None, mode: int | None) -> FileEntry:
        return await self.host.make_directory(self.id, checked_path(path), user=user, mode=mode)

    async def remove_path(self, path: str) -> None:
        await self.host.remove_path(self.id, checked_path(path))

    def pack(
        self, path: str, *, recursive: bool, user: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self.host.pack(self.id, checked_path(path), recursive=recursive, user=user)

    async def unpack(
        self, path: str, chunks: AsyncIterator[bytes], *, needs_directory: bool, user: str | None
    ) -> Unpacked:
        return await self.host.unpack(
            self.id, checked_path(path), chunks, needs_directory=needs_directory, user=user
        )

    async def metrics(self) -> GuestMetrics:
        return await self.host.metrics(self.id)

    async def processes(self) -> list[ProcessInfo]:
        return await self.host.processes(self.id)

    def start(
        self,
        command: Command,
        *,
        tag: str | None = None,
        stdin: bool = False,
        terminal: TerminalSize | None = None,
    ) -> AbstractAsyncContextManager[ProcessStream]:
        command = checked_command(command)
        return self.host.start_process(self.id, command, tag=tag, stdin=stdin, terminal=terminal)

    async def start_detached(self, command: Command, tag: str) -> int:
        return await self.host.start_detached(self.id, checked_command(command), tag=tag)

    def attach(
        self, process: ProcessRef, *, replay: bool
    ) -> AbstractAsyncContextManager[ProcessStream]:
        return self.host.attach_process(self.id, process, replay=replay)

    async def send_input(self, pid: int, data: bytes, *, terminal: bool) -> None:
        await self.host.send_input(self.id, pid, data, terminal=terminal)

    async def close_input(self, pid: int) -> None:
        await self.host.close_input(self.id, pid)

    async def resize(self, pid: int, size: TerminalSize) -> None:
        await self.host.resize_terminal(self.id, pid, size)

    async def signal(self, process: ProcessRef, signal: ProcessSignal) -> None:
        await self.host.signal_process(self.id, process, signal)


@dataclass(frozen=True, slots=True)
class Tagged:
    """A command that was started."""

    pid: int
    tag: str


class GuestService:
    def __init__(
        self,
        store: Store,
        host: Host,
        activity: Activity,
        wakeups: Wakeups,
        calls: ConcurrencyLimiter,
        health: GuestHealth,
        *,
        random: Random,
    ) -> None:
        self._store = store
        self._host = host
        self._activity = activity
        self._wakeups = wakeups
        self._calls = calls
        self._health = health
        self._spools = ConcurrencyLimiter(
            per_sandbox=SPOOLS_PER_SANDBOX,
            per_team=SPOOLS_PER_TEAM,
            what="uploads whose file comes before its path",
        )
        self._random = random

    def spooling(self, team_id: TeamId, sandbox_id: str) -> AbstractContextManager[int]:
        """A part of a call that keeps a whole file on the server; raises `QuotaExceeded`."""
        return self._spools.acquire(team_id, sandbox_id_of(sandbox_id))

    @asynccontextmanager
    async def using(self, team_id: TeamId, sandbox_id: str) -> AsyncIterator[Guest]:
        """A running sandbox, in use until the end of the block.

        Raises `NotFound` and `InvalidState`, also when the sandbox is paused or deleted during the
        block; `AgentError` when the guest fails.
        """
        known = sandbox_id_of(sandbox_id)
        with self._activity.using(known, team_id):
            async with self.watching(team_id, sandbox_id) as guest:
                self._activity.touch(known)
                try:
                    yield guest
                finally:
                    self._activity.touch(known)

    @asynccontextmanager
    async def watching(self, team_id: TeamId, sandbox_id: str) -> AsyncIterator[Guest]:
        """As `using`, but no activity: whoever watches a sandbox does not keep it awake.

        Raises `NotResponding` where the guest does not respond.
        """
        known = sandbox_id_of(sandbox_id)
        await self._require_running(team_id, known)
        await self._health.require(known)
        try:
            with self._calls.acquire(team_id, known):
                yield Guest(self._host, known)
        except NotInGuest:
            raise
        except (NotFound, AgentError) as error:
            await self._require_running(team_id, known)
            self._wakeups.reconciler.set()
            raise await self._health.explained(known, as_agent_error(error)) from error

    async def metrics(self, team_id: TeamId, sandbox_id: str) -> GuestMetrics:
        """What a running sandbox uses; no activity. Answers or fails within seconds."""
        async with self.watching(team_id, sandbox_id) as guest:
            loop = asyncio.get_running_loop()
            doubt = loop.call_later(_DOUBTFUL_SEC, self._health.suspect, guest.id)
            try:
                async with asyncio.timeout(self._health.check_sec):
                    return await guest.metrics()
            except TimeoutError as error:
                raise AgentError("The sandbox gave no metrics in time") from error
            finally:
                doubt.cancel()

    async def start_in_background(self, guest: Guest, command: Command, tag: str | None) -> Tagged:
        """Start a command that runs on; raises `InvalidRequest` where it can not be started."""
        tag = await self.tag_for(guest, tag)
        return Tagged(await guest.start_detached(command, tag), tag)

    async def tag_for(self, guest: Guest, wanted: str | None) -> str:
        """A tag for a new command; raises `Conflict` where a running one has `wanted`."""
        if wanted is None:
            return new_tag(self._random)
        if any(process.tag == wanted for process in await guest.processes()):
            raise Conflict(f"A command with the tag {wanted} is running")
        return wanted

    async def reason_of(self, stream: ProcessStream) -> str:
        """Why a command could not be started."""
        async for event in stream.events:
            if isinstance(event, Output) and event.channel is Channel.STDERR:
                return event.data.decode("utf-8", "replace").strip()
        return "The command could not be started"

    async def _require_running(self, team_id: TeamId, sandbox_id: SandboxId) -> None:
        state = await self._store.team(team_id).sandboxes.state(sandbox_id)
        if state is None:
            raise NotFound("There is no such sandbox")
        if state is not State.RUNNING:
            raise not_possible(state, "only a running sandbox can be used")


def checked_path(path: str) -> str:
    """`path` when a guest can have such a one; raises `InvalidRequest`."""
    if not path or "\0" in path:
        raise InvalidRequest("path: must not be empty and not contain a NUL character")
    if len(path.encode("utf-8", "surrogateescape")) > PATH_LIMIT:
        raise InvalidRequest(f"path: must not be longer than {PATH_LIMIT} bytes")
    return path


def decoded_path(raw_path: str) -> str:
    """A path from base64 of its bytes, those that are no UTF-8 escaped; raises `InvalidRequest`."""
    try:
        return b64decode(raw_path, validate=True).decode("utf-8", "surrogateescape")
    except ValueError as error:
        raise InvalidRequest("raw_path: must be base64 of the path's bytes") from error


def checked_user(name: str) -> str:
    """`name` when a guest can have such a user; raises `InvalidRequest`."""
    if not name or not name.isprintable() or len(name) > USER_LIMIT:
        raise InvalidRequest("user: must be the name of a user in the sandbox")
    return name


def mode_of(text: str) -> int:
    """The permission bits that octal digits stand for; raises `InvalidRequest`."""
    if not re.fullmatch("[0-7]{3,4}", text):
        raise InvalidRequest("mode: must be 3 or 4 octal digits, such as 755 or 0644")
    return int(text, 8)


def process_of(text: str) -> ProcessRef:
    """The process that a caller names by its pid or its tag."""
    if text.isascii() and text.isdigit():
        if len(text) > 9 or int(text) == 0:
            raise NotInGuest("There is no such process")
        return ProcessRef(pid=int(text))
    return ProcessRef(tag=text)
