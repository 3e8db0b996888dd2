"""What a team can do inside its running sandboxes: files, commands, terminals."""

import asyncio
import codecs
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from wrenn_sandbox.control.store.sandboxes import Life
from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    InvalidRequest,
    InvalidState,
    NotFound,
    NotInGuest,
    WrennError,
)
from wrenn_sandbox.ids import SandboxId, TeamId, new_tag
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.wire.guest import Guest
from wrenn_sandbox.wire.messages import (
    Channel,
    Command,
    GuestMetrics,
    Output,
    ProcessRef,
    ProcessStream,
)

from .activity import Activity
from .calls import ConcurrencyLimiter, checked_command, output_limit
from .context import ControlContext
from .guest_health import GuestHealth
from .lifecycle import not_possible
from .sandboxes import sandbox_id_of

SPOOLS_PER_SANDBOX = 4
SPOOLS_PER_TEAM = 16
"""Uploads of which the server keeps up to 100 MiB each, until it knows where they go."""

_DOUBTFUL_SEC = 1.0
"""After so long without metrics the guest is asked whether it is there at all."""

_ANOTHER_LIFE = "The sandbox was rolled back meanwhile, or paused and resumed"

PATH_LIMIT = 4096
"""Bytes of a path, as in Linux."""

USER_LIMIT = 256
"""Characters of a user's name; Linux has 32."""

Encoding = Literal["utf-8", "base64"]


@dataclass(frozen=True, slots=True)
class Executed:
    """A command that has ended, by itself or (`timed_out`) because its time was over.

    Then `killed` says whether the guest has told that it is dead. Both outputs are in the same
    `encoding`.
    """

    stdout: str
    stderr: str
    encoding: Encoding
    exit_code: int
    duration_ms: int
    truncated: bool
    timed_out: bool
    killed: bool


@dataclass(frozen=True, slots=True)
class Tagged:
    """A command that was started."""

    pid: int
    tag: str


class GuestService:
    def __init__(
        self,
        context: ControlContext,
        activity: Activity,
        calls: ConcurrencyLimiter,
        health: GuestHealth,
    ) -> None:
        self._store = context.store
        self._host = context.host
        self._activity = activity
        self._wakeups = context.wakeups
        self._metrics = context.metrics
        self._calls = calls
        self._health = health
        self._spools = ConcurrencyLimiter(
            per_sandbox=SPOOLS_PER_SANDBOX,
            per_team=SPOOLS_PER_TEAM,
            what="uploads whose file comes before its path",
        )
        self._output_limit = context.settings.output_limit_bytes

    def spooling(self, team_id: TeamId, sandbox_id: str) -> AbstractContextManager[None]:
        """A part of a call that keeps a whole file on the server; raises `QuotaExceeded`."""
        return self._spools.acquire(team_id, sandbox_id_of(sandbox_id))

    @asynccontextmanager
    async def using(
        self, team_id: TeamId, sandbox_id: str, *, life: Life | None = None
    ) -> AsyncIterator[Guest]:
        """A running sandbox, in use until the end of the block.

        Who has just read its `life` counts its own calls.
        Raises `NotFound` and `InvalidState`, also when the sandbox is paused, rolled back or
        deleted during the block; `AgentError` when the guest fails.
        """
        known = sandbox_id_of(sandbox_id)
        with self._activity.using(known, team_id):
            async with self.watching(team_id, sandbox_id, life=life) as guest:
                self._activity.touch(known)
                try:
                    yield guest
                finally:
                    self._activity.touch(known)

    @asynccontextmanager
    async def watching(
        self, team_id: TeamId, sandbox_id: str, *, life: Life | None = None
    ) -> AsyncIterator[Guest]:
        """As `using`, but no activity: whoever watches a sandbox does not keep it awake.

        Raises `NotResponding` where the guest does not respond.
        """
        known = sandbox_id_of(sandbox_id)
        count: AbstractContextManager[None] = nullcontext()
        if life is None:
            life = await self._require_running(team_id, known)
            count = self._calls.acquire(team_id, known)
        await self._health.require(known)
        try:
            with count:
                yield self._host.guest(known)
        except NotInGuest:
            raise
        except (NotFound, AgentError) as error:
            if await self._require_running(team_id, known) != life:
                raise InvalidState(_ANOTHER_LIFE) from error
            self._wakeups.reconciler.set()
            raise await self._health.explained(known, _as_agent_error(error)) from error

    async def ping(self, team_id: TeamId, sandbox_id: str) -> None:
        """Count as activity of a running sandbox; the guest is not asked."""
        known = sandbox_id_of(sandbox_id)
        await self._require_running(team_id, known)
        self._activity.touch(known)

    @asynccontextmanager
    async def exec(
        self, team_id: TeamId, sandbox_id: str, command: Command, timeout_sec: int
    ) -> AsyncIterator[Executed]:
        """Run a command to its end.

        The sandbox is in use, and the call counts among the team's, until the end of the block: as
        long as the output is kept.
        """
        command = checked_command(command)
        with self._metrics.operation("exec") as timing:
            async with self.using(team_id, sandbox_id) as guest:
                limit = output_limit(self._output_limit, self._calls.under_way(team_id))
                result = await guest.exec(command, timeout=timeout_sec, output_limit=limit)
                took = timing.end()
                if result.timed_out:
                    self._health.suspect(SandboxId(sandbox_id))
                else:
                    self._metrics.exec_overhead(max(0.0, took - result.duration_ms / 1000))
                cut = result.truncated or result.timed_out
                yield Executed(
                    *readable(result.stdout, result.stderr, cut=cut),
                    result.exit_code,
                    result.duration_ms,
                    result.truncated,
                    result.timed_out,
                    result.killed,
                )

    async def metrics(self, team_id: TeamId, sandbox_id: str) -> GuestMetrics:
        """What a running sandbox uses; no activity. Answers or fails within seconds."""
        async with self.watching(team_id, sandbox_id) as guest:
            loop = asyncio.get_running_loop()
            doubt = loop.call_later(_DOUBTFUL_SEC, self._health.suspect, SandboxId(sandbox_id))
            try:
                async with asyncio.timeout(self._health.check_sec):
                    return await guest.metrics()
            except TimeoutError as error:
                raise AgentError("The sandbox gave no metrics in time") from error
            finally:
                doubt.cancel()

    async def start_in_background(self, guest: Guest, command: Command, tag: str | None) -> Tagged:
        """Start a command that runs on; raises `InvalidRequest` where it cannot be started."""
        tag = await self.tag_for(guest, tag)
        return Tagged(await guest.start_detached(checked_command(command), tag=tag), tag)

    async def tag_for(self, guest: Guest, wanted: str | None) -> str:
        """A tag for a new command; raises `Conflict` where a running one has `wanted`."""
        if wanted is None:
            return new_tag()
        if any(process.tag == wanted for process in await guest.processes()):
            raise Conflict(f"A command with the tag {wanted} is running")
        return wanted

    async def reason_of(self, stream: ProcessStream) -> str:
        """Why a command could not be started."""
        async for event in stream.events:
            if isinstance(event, Output) and event.channel is Channel.STDERR:
                return event.data.decode("utf-8", "replace").strip()
        return "The command could not be started"

    async def _require_running(self, team_id: TeamId, sandbox_id: SandboxId) -> Life:
        life = await self._store.team(team_id).sandboxes.life(sandbox_id)
        if life is None:
            raise NotFound("There is no such sandbox")
        if life.state is not State.RUNNING:
            raise not_possible(life.state, "only a running sandbox can be used")
        return life


def _as_agent_error(error: WrennError) -> AgentError:
    """What a caller is told of a call to a guest that failed while its sandbox was running."""
    if isinstance(error, AgentError):
        return error
    return AgentError("The sandbox does not answer; its state is being checked")


def readable(stdout: bytes, stderr: bytes, *, cut: bool = False) -> tuple[str, str, Encoding]:
    """Both outputs as text when both are valid UTF-8, else both as base64; and which of these.

    `cut` says that they may end within a character, which is then left out.
    """
    try:
        out, err = (
            codecs.getincrementaldecoder("utf-8")().decode(each, final=not cut)
            for each in (stdout, stderr)
        )
    except UnicodeDecodeError:
        return b64encode(stdout).decode("ascii"), b64encode(stderr).decode("ascii"), "base64"
    return out, err, "utf-8"


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
