"""The steps that a sandbox's life is made of, each one task from its first write to its last.

A step marks the sandbox as in flight, asks the host, and records the outcome. Whatever happened to
the sandbox in between shows in the last write: an event that is not legal any more changes
nothing, and the step undoes its work.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Final

import msgspec

from wrenn_sandbox.control.metrics import Timing
from wrenn_sandbox.control.store.records import Rollback, Sandbox, TeamTemplate
from wrenn_sandbox.control.store.sandboxes import Change, Missing
from wrenn_sandbox.errors import Conflict, InvalidState, NoCapacity, NotFound, WrennError
from wrenn_sandbox.ids import SandboxId, new_operation_id
from wrenn_sandbox.model.sandbox import Event, IllegalTransition, State, Status, sources
from wrenn_sandbox.wire.messages import CreateSandbox, Placement

from .activity import Activity
from .context import ControlContext
from .draining import Draining
from .injections import Injections

SHUTDOWN: Final = "shutdown"
"""The actor of what the server does to sandboxes because it stops."""

WANTED: Final = {
    Event.PAUSE: "only a running sandbox can be paused",
    Event.RESUME: "only a paused sandbox can be resumed",
    Event.ROLLBACK: "only a running or paused sandbox can be rolled back",
    Event.CHECKPOINT: "only of a running or paused sandbox a snapshot can be made",
    Event.FORK: "only a running or paused sandbox can be forked",
    Event.SNAPSHOT: "only a running sandbox can become a template",
}
_CHANGED: Final = "it was changed meanwhile"
_REBOOTING: Final = "to be rebooted: a resume without memory was asked for"
_REBOOTED: Final = "rebooted: resumed without memory, as was asked for"


def reason_of(error: BaseException) -> str:
    """What the history says of a failure: nothing that a caller may not read."""
    return error.message if isinstance(error, WrennError) else "internal error"


def rebooted(placement: Placement | None) -> str | None:
    """What the history says of a sandbox whose memory was asked for and could not be had."""
    if placement is None or not placement.rebooted:
        return None
    return f"rebooted: {placement.rebooted}; its files are kept, its processes are gone"


def not_possible(state: State, wanted: str) -> InvalidState:
    return InvalidState(f"The sandbox is {state.replace('_', ' ')}; {wanted}")


@contextmanager
def refusals(wanted: str) -> Iterator[None]:
    """Tell a caller what the store says of a change: raises `InvalidState` or `NotFound`."""
    try:
        yield
    except IllegalTransition as error:
        raise not_possible(error.state, wanted) from error
    except Missing as error:
        raise NotFound("There is no such sandbox") from error


def require(sandbox: Sandbox, event: Event) -> None:
    """Raise `InvalidState` for what can be refused at once.

    Asked before an operation begins: the reconciler leaves alone what has one, and who asks over
    and over for what is refused would keep a sandbox from being corrected.
    """
    if sandbox.state not in sources(event):
        raise not_possible(sandbox.state, WANTED[event])


class Lifecycle:
    """Each step begins when it is called and goes on without its caller, who awaits its outcome."""

    def __init__(
        self,
        context: ControlContext,
        activity: Activity,
        draining: Draining,
        injections: Injections,
    ) -> None:
        self._injections = injections
        self._store = context.store.all_sandboxes
        self._rollbacks = context.store.rollbacks
        self._host = context.host
        self._operations = context.operations
        self._activity = activity
        self._draining = draining
        self._wakeups = context.wakeups
        self._metrics = context.metrics
        self._clock = context.clock
        self._deletions: dict[SandboxId, asyncio.Task[None]] = {}

    def create(
        self, sandbox: Sandbox, envs: dict[str, str], reason: str | None = None
    ) -> "asyncio.Future[Sandbox]":
        self._draining.refuse()
        timing = self._metrics.operation("create")
        work = self._create(sandbox, envs, reason, timing)
        return self._operations.run(sandbox.id, work, timing=timing)

    def pause(
        self,
        sandbox_id: SandboxId,
        actor: str = "user",
        reason: str | None = None,
        due: datetime | None = None,
        *,
        deadline_sec: int | None = None,
    ) -> "asyncio.Future[Sandbox]":
        work = self._pause(sandbox_id, actor, reason, due, deadline_sec)
        timing = self._metrics.operation("pause")
        return self._operations.run(sandbox_id, work, of_stop=actor == SHUTDOWN, timing=timing)

    def resume(
        self,
        sandbox_id: SandboxId,
        actor: str = "user",
        *,
        memory: bool = True,
        deadline_sec: int | None = None,
        deadline_at_least_sec: int | None = None,
    ) -> "asyncio.Future[Sandbox]":
        self._draining.refuse()
        timing = self._metrics.operation("resume")
        work = self._resume(sandbox_id, actor, memory, timing, deadline_sec, deadline_at_least_sec)
        return self._operations.run(sandbox_id, work, timing=timing)

    def roll_back(self, sandbox: Sandbox, template: TeamTemplate) -> "asyncio.Future[Sandbox]":
        self._draining.refuse()
        timing = self._metrics.operation("rollback")
        work = self._roll_back(sandbox, template, timing)
        return self._operations.run(sandbox.id, work, timing=timing)

    async def delete(
        self,
        sandbox_id: SandboxId,
        actor: str = "user",
        reason: str | None = None,
        due: datetime | None = None,
    ) -> None:
        """Free everything of a sandbox; callers that come meanwhile wait for the same task.

        With `due` only of one that has this deadline: else `Conflict`.
        """
        while (task := self._deletions.get(sandbox_id)) is not None:
            try:
                await asyncio.shield(task)
            except Conflict:
                continue  # it was of a deadline that the sandbox has no longer
            return
        task = self._operations.start(sandbox_id, self._delete(sandbox_id, actor, reason, due))
        self._deletions[sandbox_id] = task
        task.add_done_callback(lambda _: self._deletions.pop(sandbox_id))
        await asyncio.shield(task)

    async def _create(
        self, sandbox: Sandbox, envs: dict[str, str], reason: str | None, timing: Timing
    ) -> Sandbox:
        start = Change(Event.START, "user", sandbox.created_at, reason)
        await self._store.add(sandbox, start, envs)
        request = CreateSandbox(
            sandbox_id=sandbox.id,
            operation_id=new_operation_id(),
            image_id=sandbox.image_id,
            vcpus=sandbox.vcpus,
            memory_mb=sandbox.memory_mb,
            network=sandbox.network,
            envs=envs,
        )
        try:
            injection = await self._injections.of(sandbox.team_id, sandbox.id, sandbox.network)
            request = msgspec.structs.replace(request, injection=injection)
            placement = await self._host.create(request)
            timing.path = placement.path
        except NoCapacity as error:
            await self._store.remove_starting(sandbox, reason_of(error), self._clock())
            raise
        except Exception as error:
            await self._record(sandbox.id, Event.FAILED, "user", reason_of(error))
            self._look_into(error)
            raise
        try:
            reason = rebooted(placement)
            change = Change(Event.STARTED, "user", self._clock(), reason, placement)
            started = await self._store.apply(sandbox.id, change)
        except (IllegalTransition, Missing) as error:
            await self._host.destroy(sandbox.id, new_operation_id())
            raise InvalidState("The sandbox was deleted while it was starting") from error
        self._wakeups.autopause.set()
        self._wakeups.deadlines.set()
        return started

    async def _pause(
        self,
        sandbox_id: SandboxId,
        actor: str,
        reason: str | None,
        due: datetime | None,
        deadline_sec: int | None,
    ) -> Sandbox:
        change = Change(Event.PAUSE, actor, self._clock(), reason, due=due)
        with refusals(WANTED[Event.PAUSE]):
            sandbox = await self._store.apply(sandbox_id, change)
        try:
            if actor == "auto" and sandbox.team_id in self._activity.users_of(sandbox_id):
                raise InvalidState("The sandbox is in use again")
            await self._host.pause(sandbox_id, new_operation_id())
        except Exception as error:
            await self._record(sandbox_id, Event.PAUSE_FAILED, actor, reason_of(error))
            self._look_into(error)
            raise
        latest = self._activity.latest(sandbox_id, sandbox.last_active_at)
        change = Change(
            Event.PAUSED, actor, self._clock(), active_at=latest, deadline_sec=deadline_sec
        )
        with refusals(_CHANGED):
            return await self._store.apply(sandbox_id, change)

    async def _resume(
        self,
        sandbox_id: SandboxId,
        actor: str,
        memory: bool,
        timing: Timing,
        deadline_sec: int | None,
        deadline_at_least_sec: int | None,
    ) -> Sandbox:
        reason = None if memory else _REBOOTING
        change = Change(Event.RESUME, actor, self._clock(), reason)
        with refusals(WANTED[Event.RESUME]):
            sandbox = await self._store.resume(sandbox_id, change)
        try:
            envs = await self._store.envs(sandbox_id)
            placement = await self._host.resume(
                sandbox_id,
                new_operation_id(),
                sandbox.network,
                memory=memory,
                envs=envs,
                injection=await self._injections.of(sandbox.team_id, sandbox_id, sandbox.network),
            )
            timing.path = placement.path
        except Exception as error:
            await self._record(sandbox_id, Event.RESUME_FAILED, actor, reason_of(error))
            self._look_into(error)
            raise
        reason = rebooted(placement) if memory else _REBOOTED
        change = Change(
            Event.RESUMED,
            actor,
            self._clock(),
            reason,
            placement,
            deadline_sec=deadline_sec,
            deadline_at_least_sec=deadline_at_least_sec,
        )
        with refusals(_CHANGED):
            resumed = await self._store.apply(sandbox_id, change)
        self._wakeups.autopause.set()
        self._wakeups.deadlines.set()
        return resumed

    async def _roll_back(self, sandbox: Sandbox, template: TeamTemplate, timing: Timing) -> Sandbox:
        rollback = Rollback(sandbox.id, new_operation_id(), template.image_id)
        change = Change(Event.ROLLBACK, "user", self._clock(), f"to the snapshot {template.name}")
        with refusals(WANTED[Event.ROLLBACK]):
            sandbox = await self._rollbacks.begin(sandbox.team_id, rollback, change)
        try:
            placement = await self.ask_for_rollback(sandbox, rollback)
            timing.path = placement.path
        except Exception as error:
            ran = sandbox.status is Status.RUNNING
            failed = Event.ROLLBACK_FAILED if ran else Event.ROLLBACK_LEFT_PAUSED
            with suppress(IllegalTransition, Missing):
                await self.end_rollback(sandbox.id, failed, "user", reason_of(error))
            self._wakeups.reconciler.set()
            raise
        with refusals(_CHANGED):
            return await self.end_rollback(
                sandbox.id, Event.ROLLED_BACK, "user", rebooted(placement), placement
            )

    async def ask_for_rollback(self, sandbox: Sandbox, rollback: Rollback) -> Placement:
        """Let the host roll a sandbox back; may be repeated. Raises what `Host.rollback` raises."""
        envs = await self._store.envs(sandbox.id)
        return await self._host.rollback(
            sandbox.id,
            rollback.operation_id,
            rollback.image_id,
            sandbox.network,
            envs=envs,
            injection=await self._injections.of(sandbox.team_id, sandbox.id, sandbox.network),
        )

    async def end_rollback(
        self,
        sandbox_id: SandboxId,
        event: Event,
        actor: str,
        reason: str | None,
        placement: Placement | None = None,
    ) -> Sandbox:
        """Record the outcome of a rollback; raises `Missing` or `IllegalTransition`."""
        change = Change(event, actor, self._clock(), reason, placement)
        try:
            sandbox = await self._rollbacks.end(sandbox_id, change)
        except (IllegalTransition, Missing):
            await self._rollbacks.forget(sandbox_id)
            raise
        self._wakeups.autopause.set()
        self._wakeups.deadlines.set()
        return sandbox

    async def _delete(
        self, sandbox_id: SandboxId, actor: str, reason: str | None, due: datetime | None
    ) -> None:
        change = Change(Event.DELETE, actor, self._clock(), reason, due=due)
        try:
            await self._store.apply(sandbox_id, change)
        except Missing:
            return
        except IllegalTransition as error:
            if error.state is State.STOPPED:
                return
        await self._host.destroy(sandbox_id, new_operation_id())
        if await self._operations.wait_for_others(sandbox_id):
            await self._host.destroy(sandbox_id, new_operation_id())
        await self._record(sandbox_id, Event.DELETED, actor, None)

    async def _record(
        self, sandbox_id: SandboxId, event: Event, actor: str, reason: str | None
    ) -> None:
        """Record an outcome unless the sandbox went another way meanwhile."""
        try:
            await self._store.apply(sandbox_id, Change(event, actor, self._clock(), reason=reason))
        except (IllegalTransition, Missing):
            self._wakeups.reconciler.set()

    def _look_into(self, error: Exception) -> None:
        """Let the reconciler see what the host has after an error that does not tell."""
        if isinstance(error, NotFound) or not isinstance(error, WrennError):
            self._wakeups.reconciler.set()
