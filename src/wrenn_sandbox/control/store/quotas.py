"""What a team has and may have, and the guard that keeps the one within the other.

The guard locks the team's row first: what the same team does at the same time waits for it, and is
told of in that order (`team_events.py`). On
SQLite all writing transactions take turns anyway. Within one server a team waits before it takes a
connection, so that it never holds more than one of those that all teams share.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager
from typing import Final
from weakref import WeakValueDictionary

import msgspec
from sqlalchemy import Select, func, select, union, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.errors import QuotaExceeded
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.quota import (
    EXISTING,
    HOLDING,
    LEAVING,
    OverQuota,
    Quota,
    Usage,
    decode_override,
)
from wrenn_sandbox.model.sandbox import State

from .database import Database
from .tables import api_keys, fork_images, sandboxes, snapshot_intents, teams, templates

Check = Callable[[Quota, Usage], None]

_SOON_SEC: Final = 2.0


class QuotaTransaction:
    """Transactions after which a team has no more than it may.

    `quota` holds for every team; a team's own override goes before it.
    """

    def __init__(self, database: Database, quota: Quota) -> None:
        self._database = database
        self._quota = quota
        self._turns: WeakValueDictionary[TeamId, asyncio.Lock] = WeakValueDictionary()
        self._listeners: list[Callable[[TeamId], None]] = []

    def listen(self, listener: Callable[[TeamId], None]) -> None:
        """Tell `listener` of each team for which something was committed, or may have been."""
        self._listeners.append(listener)

    @asynccontextmanager
    async def write(self, team_id: TeamId, *checks: Check) -> AsyncIterator[AsyncConnection]:
        """A transaction; raises `QuotaExceeded` at its end, after which nothing has changed."""
        turn = self._turns.setdefault(team_id, asyncio.Lock())
        try:
            async with turn, self._database.write() as connection:
                override = await lock_team(connection, team_id)
                yield connection
                if checks:
                    quota = _own(self._quota, override)
                    self._require(quota, await _usage(connection, team_id), checks)
        finally:  # who is cancelled while it is committed does not learn that it is
            for listener in self._listeners:
                listener(team_id)

    async def team_of(self, sandbox_id: SandboxId) -> TeamId | None:
        """Whose sandbox it is, which never changes; None where there is no such sandbox."""
        query = select(sandboxes.c.team_id).where(sandboxes.c.id == sandbox_id)
        row = await self._database.row(query)
        return None if row is None else TeamId(row.team_id)

    @staticmethod
    def _require(quota: Quota, usage: Usage, checks: Sequence[Check]) -> None:
        try:
            for check in checks:
                check(quota, usage)
        except OverQuota as error:
            raise QuotaExceeded(
                str(error), limit=error.limit, retry_after=_SOON_SEC if error.passing else None
            ) from error


def _own(quota: Quota, override: str | None) -> Quota:
    return quota if override is None else decode_override(override).over(quota)


async def lock_team(connection: AsyncConnection, team_id: TeamId) -> str | None:
    """Lock a team's row until the end of the transaction; gives its override of quotas."""
    return await _override(connection, _quota_of(team_id).with_for_update(key_share=True))


def _quota_of(team_id: TeamId) -> Select[tuple[str | None]]:
    return select(teams.c.quota).where(teams.c.id == team_id)


async def _override(connection: AsyncConnection, query: Select[tuple[str | None]]) -> str | None:
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else row.quota


async def _usage(connection: AsyncConnection, team_id: TeamId) -> Usage:
    counted = (
        select(
            sandboxes.c.state,
            func.count().label("number"),
            func.sum(sandboxes.c.vcpus).label("vcpus"),
            func.sum(sandboxes.c.memory_mb).label("memory_mb"),
            func.sum(sandboxes.c.disk_bytes).label("disk_bytes"),
        )
        .where(
            sandboxes.c.team_id == team_id,
            sandboxes.c.state.in_([state.value for state in EXISTING]),
        )
        .group_by(sandboxes.c.state)
    )
    rows = [(State(row.state), row) for row in await connection.execute(counted)]
    rest = (await connection.execute(_snapshots_and_keys(team_id))).one()

    def total(states: Container[State], column: str) -> int:
        return sum(int(getattr(row, column)) for state, row in rows if state in states)

    def machines(states: Container[State]) -> Usage:
        return Usage(
            running=total(states, "number"),
            vcpus=total(states, "vcpus"),
            memory_mb=total(states, "memory_mb"),
        )

    stored_memory = total({State.SNAPSHOTTING}, "memory_mb") << 20
    copies = (await connection.execute(_copies(team_id))).one()
    return msgspec.structs.replace(
        machines(HOLDING),
        sandboxes=total(EXISTING, "number"),
        snapshots=rest.snapshots,
        disk_bytes=total(EXISTING, "disk_bytes")
        + stored_memory
        + (int(copies.memory_mb) << 20)
        + int(copies.disk_bytes)
        + int(rest.bytes),
        api_keys=rest.keys,
        leaving=machines(LEAVING),
    )


def _copies(team_id: TeamId) -> Select[tuple[int, int]]:
    """What the images under way of sandboxes that stay may take: as much as these have."""
    images = union_all(
        select(snapshot_intents.c.sandbox_id), select(fork_images.c.sandbox_id)
    ).subquery()
    return (
        select(
            func.coalesce(func.sum(sandboxes.c.memory_mb), 0).label("memory_mb"),
            func.coalesce(func.sum(sandboxes.c.disk_bytes), 0).label("disk_bytes"),
        )
        .join_from(images, sandboxes, images.c.sandbox_id == sandboxes.c.id)
        .where(sandboxes.c.team_id == team_id, sandboxes.c.state != State.SNAPSHOTTING)
    )


def _snapshots_and_keys(team_id: TeamId) -> Select[tuple[int, int, int]]:
    """A snapshot that is being replaced counts once, and no longer with its old size."""
    under_way = select(snapshot_intents.c.name).where(snapshot_intents.c.team_id == team_id)
    made = select(templates.c.name).where(templates.c.team_id == team_id)
    names = union(made, under_way).subquery()
    return select(
        select(func.count()).select_from(names).scalar_subquery().label("snapshots"),
        select(func.coalesce(func.sum(templates.c.size_bytes), 0))
        .where(templates.c.team_id == team_id, templates.c.name.not_in(under_way))
        .scalar_subquery()
        .label("bytes"),
        select(func.count())
        .select_from(api_keys)
        .where(api_keys.c.team_id == team_id)
        .scalar_subquery()
        .label("keys"),
    )


class TeamQuota:
    """What one team has and may have."""

    def __init__(self, database: Database, team_id: TeamId, quota: Quota) -> None:
        self._database = database
        self._team_id = team_id
        self._quota = quota

    async def limits(self) -> Quota:
        """What holds for the team; raises `BadQuota`."""
        async with self._database.read() as connection:
            return _own(self._quota, await _override(connection, _quota_of(self._team_id)))

    async def usage(self) -> Usage:
        async with self._database.read() as connection:
            return await _usage(connection, self._team_id)
