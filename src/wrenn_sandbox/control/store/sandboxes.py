"""Sandboxes: reading them, and changing their state under guard with an event row each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, case, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.errors import Conflict
from wrenn_sandbox.ids import ImageId, SandboxId, TeamId
from wrenn_sandbox.model.events import CREATE, DEADLINE_NEAR, REFUSED, SANDBOX, UPDATED
from wrenn_sandbox.model.limits import ENDED_KEPT
from wrenn_sandbox.model.quota import check_disk, check_machines, check_sandboxes
from wrenn_sandbox.model.sandbox import (
    ENDED,
    Event,
    IllegalTransition,
    OnDeadline,
    State,
    Status,
    after,
    shown,
    sources,
)
from wrenn_sandbox.wire.messages import Placement

from . import labels
from .accounts import has_somebody
from .database import Database
from .events import note
from .quotas import QuotaTransaction
from .records import (
    Position,
    Sandbox,
    SandboxEvent,
    SandboxFilter,
    SandboxUpdate,
    newest_first,
    oldest_first,
    record,
    values,
)
from .tables import sandbox_envs, sandbox_events, sandboxes
from .team_events import record_event
from .usage import add_run

_REASON_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to a sandbox, why and by whom.

    Actors are `user`, `auto`, `deadline`, `traffic`, `reconciler`, `host`, `health`, `shutdown` and
    `admin`. With `due` it happens only to a sandbox that has this deadline. `noted_at` is when it
    is learnt of, where that is later than `at`. `deadline_sec` gives it another deadline, so many
    seconds from `at`, or none for 0; `deadline_at_least_sec` only moves a sooner one there.
    """

    event: Event
    actor: str
    at: datetime
    reason: str | None = None
    placement: Placement | None = None
    active_at: datetime | None = None
    due: datetime | None = None
    noted_at: datetime | None = None
    deadline_sec: int | None = None
    deadline_at_least_sec: int | None = None


@dataclass(frozen=True, slots=True)
class Life:
    """The state of a sandbox, and since when it has the guest that it has or had."""

    state: State
    started_at: datetime | None


@dataclass(frozen=True, slots=True)
class Exposed:
    """What a request to a port of a sandbox needs to know of it."""

    id: SandboxId
    team_id: TeamId
    state: State
    started_at: datetime | None
    auto_resume: bool
    private_ports: bool


_MAY_RESUME = and_(sandboxes.c.auto_resume, has_somebody(sandboxes.c.team_id))
_EXPOSED = select(
    *(sandboxes.c[each.name] for each in fields(Exposed) if each.name != "auto_resume"),
    _MAY_RESUME.label("auto_resume"),
)


class Missing(Exception):
    """There is no such sandbox."""


def deadline(seconds: int, now: datetime) -> datetime | None:
    """The deadline so many seconds from now; none for 0."""
    return now + timedelta(seconds=seconds) if seconds else None


async def add(connection: AsyncConnection, sandbox: Sandbox, actor: str) -> None:
    """Add a new sandbox and the first row of its history."""
    await connection.execute(insert(sandboxes).values(values(sandbox)))
    await labels.index(connection, sandbox.team_id, sandbox.id, sandbox.metadata)
    await note(
        connection,
        sandbox.team_id,
        sandbox.id,
        CREATE,
        actor,
        sandbox.created_at,
        from_state=None,
        to_state=sandbox.state,
    )


async def apply(connection: AsyncConnection, sandbox_id: SandboxId, change: Change) -> Sandbox:
    """Apply one event to one sandbox, or raise and change nothing.

    Raises `Missing`, or `IllegalTransition` when the event is not legal in the sandbox's state,
    also when another caller changed that state first. `Conflict`: it has another deadline.
    """
    for _ in range(len(State)):
        row = (
            await connection.execute(select(sandboxes).where(sandboxes.c.id == sandbox_id))
        ).one_or_none()
        if row is None:
            raise Missing(sandbox_id)
        sandbox = record(Sandbox, row)
        state = after(sandbox.state, change.event)
        query = update(sandboxes).where(
            sandboxes.c.id == sandbox_id, sandboxes.c.state == sandbox.state
        )
        if change.due is not None:
            if sandbox.deadline_at != change.due:
                raise Conflict("The sandbox was given another deadline")
            query = query.where(sandboxes.c.deadline_at == change.due)
        result = await connection.execute(
            query.values(**_values(sandbox, state, change)).returning(sandboxes)
        )
        changed = result.one_or_none()
        if changed is None:
            continue
        if changed.running_since is None:
            await add_run(connection, sandbox, change.at)
        if state in ENDED:
            await connection.execute(
                delete(sandbox_envs).where(sandbox_envs.c.sandbox_id == sandbox_id)
            )
        await note(
            connection,
            sandbox.team_id,
            sandbox_id,
            change.event,
            change.actor,
            change.at,
            from_state=sandbox.state,
            to_state=state,
            reason=None if change.reason is None else _storable(change.reason),
            told_at=change.noted_at,
        )
        return record(Sandbox, changed)
    raise IllegalTransition(sandbox.state, change.event)


def _storable(reason: str) -> str:
    """A guest may have had a say in the reason; PostgreSQL keeps neither NUL nor surrogates."""
    text = reason.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    return text[:_REASON_LENGTH]


def _values(
    sandbox: Sandbox, state: State, change: Change
) -> dict[str, str | int | datetime | None]:
    status = shown(state, sandbox.status)
    values: dict[str, str | int | datetime | None] = {
        "state": state,
        "status": status,
        "last_updated": change.noted_at or change.at,
    }
    if status is not Status.RUNNING:
        values["running_since"] = None
    elif sandbox.running_since is None:
        values["running_since"] = change.at
    if change.event in (Event.STARTED, Event.RESUMED, Event.ROLLED_BACK):
        values |= {"started_at": change.at, "last_active_at": change.at, "reason": None}
    elif change.reason is not None and state is not sandbox.state:
        values["reason"] = _storable(change.reason)
    if change.active_at is not None:
        values["last_active_at"] = change.active_at
    if change.deadline_sec is not None:
        values["deadline_at"] = deadline(change.deadline_sec, change.at)
    if change.deadline_at_least_sec is not None and sandbox.deadline_at is not None:
        least = change.at + timedelta(seconds=change.deadline_at_least_sec)
        values["deadline_at"] = max(sandbox.deadline_at, least)
    if change.placement is not None:
        values |= {"guest_ip": change.placement.guest_ip, "host_ip": change.placement.host_ip}
    return values


class TeamSandboxes:
    """The sandboxes of one team; those of others do not exist here."""

    def __init__(self, database: Database, team_id: TeamId, guard: QuotaTransaction) -> None:
        self._database = database
        self._team_id = team_id
        self._guard = guard
        self._mine = sandboxes.c.team_id == team_id

    async def get(self, sandbox_id: SandboxId) -> Sandbox | None:
        query = select(sandboxes).where(sandboxes.c.id == sandbox_id, self._mine)
        return await self._database.record(Sandbox, query)

    async def of_image(self, image_id: ImageId) -> list[Sandbox]:
        """Those that were made from an image, oldest first."""
        query = select(sandboxes).where(self._mine, sandboxes.c.image_id == image_id)
        return await self._database.records(Sandbox, query.order_by(sandboxes.c.created_at))

    async def life(self, sandbox_id: SandboxId) -> Life | None:
        """What the hot path needs, and no more."""
        query = select(sandboxes.c.state, sandboxes.c.started_at).where(
            sandboxes.c.id == sandbox_id, self._mine
        )
        return await self._database.record(Life, query)

    async def page(
        self, wanted: SandboxFilter, limit: int | None, position: Position | None
    ) -> list[Sandbox]:
        query = select(sandboxes).where(
            self._mine, *(labels.labelled(self._team_id, *each) for each in wanted.labels)
        )
        if wanted.statuses:
            query = query.where(sandboxes.c.status.in_(wanted.statuses))
        if wanted.template is not None:
            query = query.where(sandboxes.c.template == wanted.template)
        if wanted.created_after is not None:
            query = query.where(sandboxes.c.created_at > wanted.created_after)
        in_order = oldest_first if wanted.oldest_first else newest_first
        query = in_order(query, sandboxes, limit, position)
        return await self._database.records(Sandbox, query)

    async def update(
        self, sandbox_id: SandboxId, changed: SandboxUpdate, at: datetime
    ) -> Sandbox | None:
        """Change what is given of a sandbox that has not ended; None where there is none."""
        given = {name: value for name, value in values(changed).items() if value is not None}
        columns = {name: given[name] for name in given if not name.startswith("deadline_")}
        if changed.deadline_sec is not None:
            columns["deadline_at"] = deadline(changed.deadline_sec, at)
        if changed.deadline_at_least_sec is not None:
            least = at + timedelta(seconds=changed.deadline_at_least_sec)
            sooner = sandboxes.c.deadline_at < least
            columns["deadline_at"] = case((sooner, least), else_=sandboxes.c.deadline_at)
        not_ended = sandboxes.c.state.not_in(ENDED)
        async with self._guard.write(self._team_id) as connection:
            result = await connection.execute(
                update(sandboxes)
                .where(sandboxes.c.id == sandbox_id, self._mine, not_ended)
                .values(**columns, last_updated=at)
                .returning(sandboxes)
            )
            row = result.one_or_none()
            if row is None:
                return None
            sandbox = record(Sandbox, row)
            if changed.metadata is not None:
                await labels.index(connection, self._team_id, sandbox_id, changed.metadata)
            await note(
                connection,
                self._team_id,
                sandbox_id,
                UPDATED,
                "user",
                at,
                from_state=sandbox.state,
                to_state=sandbox.state,
                reason=", ".join(given),
            )
        return sandbox

    async def events(
        self, sandbox_id: SandboxId, limit: int | None, before: int | None
    ) -> list[SandboxEvent]:
        """The history, newest first, below the number `before`."""
        query = (
            select(sandbox_events)
            .join_from(sandbox_events, sandboxes, sandboxes.c.id == sandbox_events.c.sandbox_id)
            .where(sandbox_events.c.sandbox_id == sandbox_id, self._mine)
            .order_by(sandbox_events.c.number.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(sandbox_events.c.number < before)
        return await self._database.records(SandboxEvent, query)


class AllSandboxes:
    """Sandboxes of every team: for the platform's own work, never for a request's answer."""

    def __init__(self, database: Database, guard: QuotaTransaction) -> None:
        self._database = database
        self._guard = guard

    async def add(
        self, sandbox: Sandbox, start: Change, envs: Mapping[str, str] | None = None
    ) -> Sandbox:
        """Add a pending sandbox and start it, in one transaction; raises `QuotaExceeded`.

        Its `envs` are kept until it ends, and no record of a sandbox has them.
        """
        checks = (check_machines, check_sandboxes, check_disk)
        async with self._guard.write(sandbox.team_id, *checks) as connection:
            await add(connection, sandbox, start.actor)
            if envs:
                row = {"sandbox_id": sandbox.id, "envs": envs}
                await connection.execute(insert(sandbox_envs).values(row))
            return await apply(connection, sandbox.id, start)

    async def resume(self, sandbox_id: SandboxId, change: Change) -> Sandbox:
        """Apply an event that gives a sandbox a machine again.

        Raises `Missing`, `IllegalTransition` or `QuotaExceeded`; nothing has changed then.
        """
        team_id = await self._guard.team_of(sandbox_id)
        if team_id is None:
            raise Missing(sandbox_id)
        async with self._guard.write(team_id, check_machines, check_disk) as connection:
            return await apply(connection, sandbox_id, change)

    async def apply(self, sandbox_id: SandboxId, *changes: Change) -> Sandbox:
        """Apply events in one transaction; raises `Missing` or `IllegalTransition`."""
        team_id = await self._guard.team_of(sandbox_id)
        if team_id is None:
            raise Missing(sandbox_id)
        async with self._guard.write(team_id) as connection:
            for change in changes:
                sandbox = await apply(connection, sandbox_id, change)
        return sandbox

    async def get(self, sandbox_id: SandboxId) -> Sandbox | None:
        found = await self._all(sandboxes.c.id == sandbox_id)
        return found[0] if found else None

    async def exposed(self, sandbox_id: SandboxId) -> Exposed | None:
        """A sandbox as those see it who come to one of its ports, whoever they are.

        None of a team without anybody is resumed.
        """
        return await self._database.record(Exposed, _EXPOSED.where(sandboxes.c.id == sandbox_id))

    async def envs(self, sandbox_id: SandboxId) -> dict[str, str]:
        """The environment of all commands in a sandbox, as its creator gave it."""
        query = select(sandbox_envs.c.envs).where(sandbox_envs.c.sandbox_id == sandbox_id)
        row = await self._database.row(query)
        return {} if row is None else row.envs

    async def in_states(self, states: Sequence[State]) -> list[Sandbox]:
        return await self._all(sandboxes.c.state.in_(states))

    async def with_timeout(self) -> list[Sandbox]:
        """The running sandboxes that are paused after a time without activity."""
        return await self._all(sandboxes.c.state == State.RUNNING, sandboxes.c.timeout_sec > 0)

    async def with_deadline(self) -> list[Sandbox]:
        """The sandboxes to which something happens at their deadline."""
        deleted = sandboxes.c.on_deadline == OnDeadline.DELETE
        return await self._all(
            sandboxes.c.deadline_at.is_not(None),
            or_(
                sandboxes.c.state == State.RUNNING,
                and_(sandboxes.c.state == State.PAUSED, deleted),
            ),
        )

    async def tell_deadline(self, sandbox: Sandbox, actor: str, at: datetime) -> None:
        """Note in the history, once, that the deadline of a sandbox is near."""
        if sandbox.deadline_at is None or sandbox.deadline_told == sandbox.deadline_at:
            return
        query = update(sandboxes).where(
            sandboxes.c.id == sandbox.id,
            sandboxes.c.state == sandbox.state,
            sandboxes.c.deadline_at == sandbox.deadline_at,
        )
        async with self._guard.write(sandbox.team_id) as connection:
            changed = await connection.execute(query.values(deadline_told=sandbox.deadline_at))
            if changed.rowcount == 0:
                return
            await note(
                connection,
                sandbox.team_id,
                sandbox.id,
                DEADLINE_NEAR,
                actor,
                at,
                from_state=sandbox.state,
                to_state=sandbox.state,
                reason=f"{sandbox.on_deadline} at {sandbox.deadline_at:%Y-%m-%dT%H:%M:%SZ}",
            )

    async def running_without_somebody(self) -> list[Sandbox]:
        """The running sandboxes of teams whose users are all disabled."""
        return await self._all(
            sandboxes.c.state == State.RUNNING, ~has_somebody(sandboxes.c.team_id)
        )

    async def _all(self, *conditions: ColumnElement[bool]) -> list[Sandbox]:
        return await self._database.records(Sandbox, select(sandboxes).where(*conditions))

    async def remove_starting(self, sandbox: Sandbox, reason: str, now: datetime) -> bool:
        """Forget a sandbox for which nothing was started; false when it was deleted meanwhile.

        Its team, which was told of its beginning, is told `reason`.
        """
        starting = sandboxes.c.state.in_(sources(Event.STARTED))
        removed = delete(sandboxes).where(sandboxes.c.id == sandbox.id, starting)
        async with self._guard.write(sandbox.team_id) as connection:
            if (await connection.execute(removed)).rowcount != 1:
                return False
            told = {"sandbox_id": sandbox.id, "from": State.STARTING, "reason": reason}
            await record_event(connection, sandbox.team_id, SANDBOX + REFUSED, now, told)
        return True

    async def remove_ended(self, before: datetime) -> int:
        """Remove stopped and failed sandboxes that changed last before `before`.

        Of each team the last `ENDED_KEPT` at most are left.
        """
        ended = sandboxes.c.state.in_(ENDED)
        place = func.row_number().over(
            partition_by=sandboxes.c.team_id,
            order_by=(sandboxes.c.last_updated.desc(), sandboxes.c.id),
        )
        placed = select(sandboxes.c.id, place.label("place")).where(ended).subquery()
        too_many = select(placed.c.id).where(placed.c.place > ENDED_KEPT)
        old = or_(sandboxes.c.last_updated < before, sandboxes.c.id.in_(too_many))
        return await self._database.change(delete(sandboxes).where(ended, old))

    async def touch(self, active: Mapping[SandboxId, datetime]) -> None:
        """Move `last_active_at` of these sandboxes forward."""
        await self._database.move_forward(sandboxes, "last_active_at", active.items())

    async def note_disk(self, sizes: Mapping[SandboxId, int]) -> None:
        """Write down what these sandboxes take on disk, in bytes; rows in the order of ids."""
        async with self._database.write() as connection:
            for sandbox_id, size in sorted(sizes.items()):
                await connection.execute(
                    update(sandboxes).where(sandboxes.c.id == sandbox_id).values(disk_bytes=size)
                )

    async def count_by_status(self) -> dict[str, int]:
        query = select(sandboxes.c.status, func.count().label("total")).group_by(sandboxes.c.status)
        return {row.status: row.total for row in await self._database.rows(query)}
