"""What a team can do with its sandboxes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime

from wrenn_sandbox.control.store.records import (
    Position,
    Sandbox,
    SandboxEvent,
    SandboxFilter,
    SandboxUpdate,
    TeamTemplate,
)
from wrenn_sandbox.control.store.sandboxes import deadline
from wrenn_sandbox.errors import Conflict, InvalidRequest, InvalidState, NotFound, WrennError
from wrenn_sandbox.ids import ImageId, SandboxId, TeamId, is_id
from wrenn_sandbox.model.limits import Bounds, OutOfBounds
from wrenn_sandbox.model.quota import Quota, Usage
from wrenn_sandbox.model.sandbox import IN_FLIGHT, Event, OnDeadline, State, Status
from wrenn_sandbox.model.usage import DAYS_MAX, DAYS_SHOWN, DayUsage
from wrenn_sandbox.wire.messages import Egress

from .activity import Activity
from .context import ControlContext
from .forks import Forks
from .lifecycle import Lifecycle, not_possible, require
from .network import NetworkPolicies
from .templates import Templates


def sandbox_id_of(text: str) -> SandboxId:
    """Raises `NotFound` for what cannot be the id of a sandbox."""
    if not is_id("sb", text):
        raise NotFound("There is no such sandbox")
    return SandboxId(text)


@contextmanager
def _bounded() -> Iterator[None]:
    """Tell a caller what is outside its bounds: raises `InvalidRequest`."""
    try:
        yield
    except OutOfBounds as error:
        raise InvalidRequest(str(error)) from error


class SandboxService:
    def __init__(
        self,
        context: ControlContext,
        lifecycle: Lifecycle,
        templates: Templates,
        activity: Activity,
        policies: NetworkPolicies,
        forks: Forks,
    ) -> None:
        self._store = context.store
        self._forks = forks
        self._lifecycle = lifecycle
        self._templates = templates
        self._activity = activity
        self._policies = policies
        self._bounds = Bounds(
            max_vcpus=context.settings.max_vcpus,
            min_memory_mb=context.settings.min_memory_mb,
            max_memory_mb=context.settings.max_memory_mb,
            max_timeout_sec=context.settings.max_timeout_sec,
        )
        self._settings = context.settings
        self._operations = context.operations
        self._wakeups = context.wakeups
        self._clock = context.clock

    async def create(
        self,
        team_id: TeamId,
        sandbox_id: SandboxId,
        *,
        template: str | None,
        vcpus: int | None,
        memory_mb: int | None,
        timeout_sec: int,
        deadline_sec: int,
        on_deadline: OnDeadline,
        auto_resume: bool = False,
        private_ports: bool = False,
        network: Egress = Egress(),  # noqa: B008 - immutable
        metadata: dict[str, str],
        envs: dict[str, str],
    ) -> Sandbox:
        """Start a sandbox under this new id and wait until its agent has answered.

        Without a size it gets the template's. A snapshot fixes the size, whatever the caller
        says. Raises `InvalidRequest`, `NotFound` for
        the template, and what `Host.create` raises.
        """
        with _bounded():
            self._bounds.check(
                vcpus=vcpus,
                memory_mb=memory_mb,
                timeout_sec=timeout_sec,
                deadline_sec=deadline_sec,
            )
        policy = await self._policies.accepted(team_id, network, "network.")
        name = self._settings.default_template if template is None else template
        found = await self._templates.find(team_id, name)
        if isinstance(found, TeamTemplate):
            vcpus = memory_mb = None
        now = self._clock()
        sandbox = Sandbox(
            id=sandbox_id,
            team_id=team_id,
            state=State.PENDING,
            status=Status.PENDING,
            template=name,
            image_id=found.image_id,
            vcpus=found.vcpus if vcpus is None else vcpus,
            memory_mb=found.memory_mb if memory_mb is None else memory_mb,
            timeout_sec=timeout_sec,
            network=policy,
            metadata=metadata,
            deadline_at=deadline(deadline_sec, now),
            on_deadline=on_deadline,
            auto_resume=auto_resume,
            private_ports=private_ports,
            created_at=now,
            last_updated=now,
        )
        return await self._lifecycle.create(sandbox, envs)

    async def made(self, team_id: TeamId, sandbox_id: SandboxId) -> Sandbox | None:
        """What came of a create with this id whose answer was lost, None where it has failed.

        Raises `Conflict` where that is not known yet.
        """
        sandbox = await self._store.team(team_id).sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.state is State.ERROR:
            return None
        if sandbox.state in (State.PENDING, State.STARTING):
            raise Conflict(
                "The server was interrupted while it made this sandbox; try again", retry_after=1
            )
        return None if sandbox.started_at is None else self._with_activity(sandbox)

    async def get(self, team_id: TeamId, sandbox_id: str) -> Sandbox:
        sandbox = await self._store.team(team_id).sandboxes.get(sandbox_id_of(sandbox_id))
        if sandbox is None:
            raise NotFound("There is no such sandbox")
        return self._with_activity(sandbox)

    async def settled(self, team_id: TeamId, sandbox_id: str) -> Sandbox:
        """As `get`, when what changes its state has come to an end."""
        sandbox = await self.get(team_id, sandbox_id)
        if sandbox.state in IN_FLIGHT and await self._operations.wait_for_others(sandbox.id):
            return await self.get(team_id, sandbox_id)
        return sandbox

    async def update(self, team_id: TeamId, sandbox_id: str, changed: SandboxUpdate) -> Sandbox:
        """Change what is given; raises `InvalidState` for a sandbox that has ended."""
        with _bounded():
            self._bounds.check(timeout_sec=changed.timeout_sec, deadline_sec=changed.deadline_sec)
            self._bounds.check(deadline_sec=changed.deadline_at_least_sec)
        sandbox = await self.get(team_id, sandbox_id)
        if changed == SandboxUpdate():
            return sandbox
        store = self._store.team(team_id).sandboxes
        updated = await store.update(sandbox.id, changed, self._clock())
        if updated is None:
            sandbox = await self.get(team_id, sandbox_id)
            raise not_possible(sandbox.state, "one that has ended cannot be changed")
        self._wakeups.autopause.set()
        self._wakeups.deadlines.set()
        return self._with_activity(updated)

    async def page(
        self, team_id: TeamId, wanted: SandboxFilter, limit: int | None, after: Position | None
    ) -> list[Sandbox]:
        found = await self._store.team(team_id).sandboxes.page(wanted, limit, after)
        return [self._with_activity(sandbox) for sandbox in found]

    async def events(
        self, team_id: TeamId, sandbox_id: str, limit: int | None, before: int | None
    ) -> list[SandboxEvent]:
        sandbox = await self.get(team_id, sandbox_id)
        return await self._store.team(team_id).sandboxes.events(sandbox.id, limit, before)

    async def delete(self, team_id: TeamId, sandbox_id: str) -> None:
        sandbox = await self.get(team_id, sandbox_id)
        if sandbox.state is not State.STOPPED:
            await self._lifecycle.delete(sandbox.id)

    async def pause(
        self, team_id: TeamId, sandbox_id: str, *, deadline_sec: int | None = None
    ) -> Sandbox:
        """Store a running sandbox; `deadline_sec` then gives it another deadline, 0 none."""
        sandbox = await self.get(team_id, sandbox_id)
        require(sandbox, Event.PAUSE)
        return await self._lifecycle.pause(sandbox.id, deadline_sec=deadline_sec)

    async def resume(
        self,
        team_id: TeamId,
        sandbox_id: str,
        *,
        memory: bool = True,
        deadline_sec: int | None = None,
    ) -> Sandbox:
        """Continue a paused sandbox; without `memory` it starts from its disk.

        With `deadline_sec` it has another deadline when it runs. `InvalidState` also where its
        deadline has passed and there is no other: it would be paused again at once.
        """
        with _bounded():
            self._bounds.check(deadline_sec=deadline_sec)
        sandbox = await self.get(team_id, sandbox_id)
        require(sandbox, Event.RESUME)
        if deadline_sec is None:
            self._require_time(sandbox)
        return await self._lifecycle.resume(sandbox.id, memory=memory, deadline_sec=deadline_sec)

    async def fork(
        self,
        team_id: TeamId,
        image_id: ImageId,
        *,
        sandbox_id: str,
        count: int,
        timeout_sec: int | None = None,
        deadline_sec: int | None = None,
        network: Egress | None = None,
    ) -> list[Sandbox | WrennError]:
        """Make sandboxes that go on from where this one is, with an image of this new id.

        See `Forks.make`.
        """
        source = await self.get(team_id, sandbox_id)
        with _bounded():
            self._bounds.check(timeout_sec=timeout_sec, deadline_sec=deadline_sec)
        policy = None
        if network is not None:
            policy = await self._policies.accepted(team_id, network, "network.")
        require(source, Event.FORK)
        if deadline_sec is None:
            self._require_time(source)
        return await self._forks.make(
            source,
            image_id,
            count,
            timeout_sec=timeout_sec,
            deadline_sec=deadline_sec,
            network=policy,
        )

    async def forks_made(self, team_id: TeamId, image_id: ImageId) -> list[Sandbox] | None:
        """The forks that were started from this image by a request whose answer was lost.

        None where there are none. Raises `Conflict` where that is not known yet.
        """
        found = await self._store.team(team_id).sandboxes.of_image(image_id)
        if any(sandbox.state in (State.PENDING, State.STARTING) for sandbox in found):
            raise Conflict(
                "The server was interrupted while it made these forks; try again", retry_after=1
            )
        return [self._with_activity(each) for each in found if each.started_at is not None] or None

    async def roll_back(self, team_id: TeamId, sandbox_id: str, snapshot: str) -> Sandbox:
        """Let a running or paused sandbox go on from a snapshot that was made of it."""
        sandbox = await self.get(team_id, sandbox_id)
        template = await self._templates.snapshot(team_id, snapshot)
        if template.sandbox_id != sandbox.id:
            raise InvalidRequest(
                f"snapshot: {snapshot} was not made of this sandbox; create a sandbox from it"
            )
        require(sandbox, Event.ROLLBACK)
        self._require_time(sandbox)
        return await self._lifecycle.roll_back(sandbox, template)

    async def usage(self, team_id: TeamId) -> tuple[Quota, Usage]:
        """What a team may have, and what it has."""
        quota = self._store.team(team_id).quota
        return await quota.limits(), await quota.usage()

    async def usage_history(
        self, team_id: TeamId, first: date | None, last: date | None
    ) -> tuple[datetime, list[DayUsage]]:
        """What a team used on each of these days (UTC), and until when the last of them counts.

        By default the last ones until today. Raises `InvalidRequest`.
        """
        now = self._clock()
        last = last or now.astimezone(UTC).date()
        if first is None:
            first = date.fromordinal(max(1, last.toordinal() - DAYS_SHOWN + 1))
        if not 0 <= (last - first).days < DAYS_MAX:
            raise InvalidRequest(f"from: must be to, or at most {DAYS_MAX - 1} days before it")
        return now, await self._store.team(team_id).usage.days(first, last, now)

    async def set_network(self, team_id: TeamId, sandbox_id: str, wanted: Egress) -> Egress:
        """Give a running or paused sandbox another network policy; see `NetworkPolicies.change`."""
        return await self._policies.change(team_id, sandbox_id_of(sandbox_id), wanted)

    def _require_time(self, sandbox: Sandbox) -> None:
        """Raise `InvalidState` for one whose deadline has passed: what runs would end at once."""
        if sandbox.deadline_at is not None and sandbox.deadline_at <= self._clock():
            raise InvalidState(
                "The deadline of the sandbox has passed; give it another one or none "
                "(deadline_sec) first"
            )

    def _with_activity(self, sandbox: Sandbox) -> Sandbox:
        latest = self._activity.latest(sandbox.id, sandbox.last_active_at)
        return sandbox if latest is None else replace(sandbox, last_active_at=latest)
