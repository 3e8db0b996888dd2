"""What happened to what a team has, numbered in the order in which it was committed.

These rows are what teams are told, as they are told it, and outlive what they tell of: the history
of a sandbox (`events.py`) goes with it.

The number is the team's own counter, taken in the transaction of the event. It is a lock of the
team's row until the commit, so no number is visible before a lower one, and none is missing. Who
records an event has locked that row first, with `QuotaTransaction.write`: in another order two
transactions could wait for each other.
"""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Final

import msgspec
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.events import KEPT

from .database import Database
from .records import TeamEvent
from .tables import team_events, teams

_TRIM_EVERY: Final = 100
"""Rows beyond those that are kept go in lots."""


async def record_event(
    connection: AsyncConnection,
    team_id: TeamId,
    type: str,
    at: datetime,
    data: Mapping[str, str | None],
) -> None:
    """Tell a team of something that happens in this transaction; what is None is left out."""
    counted = (
        update(teams)
        .where(teams.c.id == team_id)
        .values(last_event=teams.c.last_event + 1)
        .returning(teams.c.last_event)
    )
    number = (await connection.execute(counted)).scalar_one()
    told = {name: value for name, value in data.items() if value is not None}
    await connection.execute(
        insert(team_events).values(
            team_id=team_id,
            number=number,
            type=type,
            at=at,
            data=msgspec.json.encode(told).decode("utf-8"),
        )
    )
    if number % _TRIM_EVERY == 0:
        old = (team_events.c.team_id == team_id) & (team_events.c.number <= number - KEPT)
        await connection.execute(delete(team_events).where(old))


class TeamEvents:
    """The events of one team; those of others do not exist here."""

    def __init__(self, database: Database, team_id: TeamId) -> None:
        self._database = database
        self._team_id = team_id
        self._mine = team_events.c.team_id == team_id

    async def last(self) -> int:
        """The number of the last event; 0 before the first."""
        found = await self._database.rows(
            select(teams.c.last_event).where(teams.c.id == self._team_id)
        )
        return int(found[0].last_event) if found else 0

    async def after(self, number: int, limit: int) -> list[TeamEvent]:
        """The first events behind this one that are kept, in order."""
        query = (
            select(team_events)
            .where(self._mine, team_events.c.number > number)
            .order_by(team_events.c.number)
            .limit(limit)
        )
        return await self._database.records(TeamEvent, query)

    async def page(self, limit: int | None, before: int | None) -> list[TeamEvent]:
        """Those that are kept, newest first, below the number `before`."""
        query = (
            select(team_events).where(self._mine).order_by(team_events.c.number.desc()).limit(limit)
        )
        if before is not None:
            query = query.where(team_events.c.number < before)
        return await self._database.records(TeamEvent, query)


class AllEvents:
    """Events of every team: for the platform's own work."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def last(self, of: Collection[TeamId]) -> dict[TeamId, int]:
        """The number of the last event of each of these teams."""
        query = select(teams.c.id, teams.c.last_event).where(teams.c.id.in_(of))
        return {TeamId(row.id): row.last_event for row in await self._database.rows(query)}

    async def remove_old(self, before: datetime) -> int:
        """Remove the events before this time, and whatever has a lower number; gives how many."""
        newest = func.max(team_events.c.number).label("number")
        old = (
            select(team_events.c.team_id, newest)
            .where(team_events.c.at < before)
            .group_by(team_events.c.team_id)
        )
        removed = 0
        for row in await self._database.rows(old):
            mine = (team_events.c.team_id == row.team_id) & (team_events.c.number <= row.number)
            removed += await self._database.change(delete(team_events).where(mine))
        return removed
