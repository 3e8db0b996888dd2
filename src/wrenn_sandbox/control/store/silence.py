"""The running sandboxes whose guests do not respond, as their history says.

A row `not_responding` opens a silence, and any later row that is not `UNRELATED` ends it:
`responding`, or the step of the sandbox's life that took the guest away. No state changes.
"""

from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.events import RESPONDING, SILENT
from wrenn_sandbox.model.sandbox import State

from .database import Database
from .events import UNRELATED, note
from .quotas import QuotaTransaction
from .tables import sandbox_events, sandboxes


class Silences:
    """For the platform's own work: sandboxes of every team."""

    def __init__(self, database: Database, guard: QuotaTransaction) -> None:
        self._database = database
        self._guard = guard

    async def all(self) -> dict[SandboxId, datetime]:
        """The running sandboxes that are silent, and since when."""
        each = sandbox_events.alias()
        newest = (
            select(func.max(each.c.number))
            .where(each.c.sandbox_id == sandboxes.c.id, each.c.event.not_in(UNRELATED))
            .scalar_subquery()
        )
        query = (
            select(sandboxes.c.id, sandbox_events.c.at)
            .join_from(sandboxes, sandbox_events, sandbox_events.c.number == newest)
            .where(sandboxes.c.state == State.RUNNING, sandbox_events.c.event == SILENT)
        )
        return {SandboxId(row.id): row.at for row in await self._database.rows(query)}

    async def begin(
        self, sandbox_id: SandboxId, reason: str, actor: str, since: datetime
    ) -> datetime | None:
        """Note that a guest does not respond, if that is not known yet.

        Returns since when it does not, None where the sandbox does not run.
        """
        team_id = await self._guard.team_of(sandbox_id)
        if team_id is None:
            return None
        async with self._guard.write(team_id) as connection:
            if not await _runs(connection, sandbox_id):
                return None
            known = await _silent_since(connection, sandbox_id)
            if known is None:
                await _note(connection, team_id, sandbox_id, SILENT, reason, actor, since)
            return known or since

    async def end(self, sandbox_id: SandboxId, reason: str, actor: str, at: datetime) -> None:
        """Note that the guest of a running sandbox responds, if it is known not to have done so."""
        team_id = await self._guard.team_of(sandbox_id)
        if team_id is None:
            return
        async with self._guard.write(team_id) as connection:
            if await _runs(connection, sandbox_id) and await _silent_since(connection, sandbox_id):
                await _note(connection, team_id, sandbox_id, RESPONDING, reason, actor, at)


async def _runs(connection: AsyncConnection, sandbox_id: SandboxId) -> bool:
    """Whether a sandbox runs; if so it does until the end of the transaction."""
    query = select(sandboxes.c.state).where(sandboxes.c.id == sandbox_id).with_for_update()
    state = (await connection.execute(query)).scalar_one_or_none()
    return state == State.RUNNING.value


async def _silent_since(connection: AsyncConnection, sandbox_id: SandboxId) -> datetime | None:
    query = (
        select(sandbox_events.c.event, sandbox_events.c.at)
        .where(sandbox_events.c.sandbox_id == sandbox_id, sandbox_events.c.event.not_in(UNRELATED))
        .order_by(sandbox_events.c.number.desc())
        .limit(1)
    )
    row = (await connection.execute(query)).one_or_none()
    return row.at if row is not None and row.event == SILENT else None


async def _note(
    connection: AsyncConnection,
    team_id: TeamId,
    sandbox_id: SandboxId,
    event: str,
    reason: str,
    actor: str,
    at: datetime,
) -> None:
    await connection.execute(
        update(sandboxes)
        .where(sandboxes.c.id == sandbox_id)
        .values(reason=reason if event == SILENT else None, last_updated=at)
    )
    runs = State.RUNNING
    await note(
        connection,
        team_id,
        sandbox_id,
        event,
        actor,
        at,
        from_state=runs,
        to_state=runs,
        reason=reason,
    )
