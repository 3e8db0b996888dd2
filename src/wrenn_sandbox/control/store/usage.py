"""How long the sandboxes of each team have run, by day.

A sandbox runs as long as callers see it running. Since when is in its row, written with the
transition that lets it run. The transition that ends this adds what it used to the team's days. So
the sums are what the history of all sandboxes says, whenever a server dies, and outlive them.
"""

from collections.abc import Iterator
from datetime import date, datetime

from sqlalchemy import Date, Integer, cast, insert, null, select, union_all, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.usage import DayUsage, Run, by_day

from .database import Database
from .records import Sandbox
from .tables import UtcDateTime, sandboxes, usage_days


async def add_run(connection: AsyncConnection, sandbox: Sandbox, until: datetime) -> None:
    """Add what a sandbox has used since it runs; its team's row is locked."""
    if sandbox.running_since is None:
        return
    run = Run(sandbox.vcpus, sandbox.memory_mb, sandbox.running_since, until)
    for used in run.days():
        this = (usage_days.c.team_id == sandbox.team_id) & (usage_days.c.day == used.day)
        added = await connection.execute(
            update(usage_days)
            .where(this)
            .values(
                running_us=usage_days.c.running_us + used.running_us,
                vcpu_us=usage_days.c.vcpu_us + used.vcpu_us,
                memory_mb_us=usage_days.c.memory_mb_us + used.memory_mb_us,
            )
        )
        if added.rowcount == 0:
            await connection.execute(
                insert(usage_days).values(
                    team_id=sandbox.team_id,
                    day=used.day,
                    running_us=used.running_us,
                    vcpu_us=used.vcpu_us,
                    memory_mb_us=used.memory_mb_us,
                )
            )


class TeamUsage:
    """What one team has used; that of others does not exist here."""

    def __init__(self, database: Database, team_id: TeamId) -> None:
        self._database = database
        self._team_id = team_id

    async def days(self, first: date, last: date, now: datetime) -> list[DayUsage]:
        """Each day from the first to the last; what runs counts until now.

        One query finds both: a sandbox that is paused meanwhile counts once.
        """
        ended = select(
            usage_days.c.day,
            usage_days.c.running_us,
            usage_days.c.vcpu_us,
            usage_days.c.memory_mb_us,
            cast(null(), UtcDateTime).label("since"),
            cast(null(), Integer).label("vcpus"),
            cast(null(), Integer).label("memory_mb"),
        ).where(usage_days.c.team_id == self._team_id, usage_days.c.day.between(first, last))
        running = select(
            cast(null(), Date),
            null(),
            null(),
            null(),
            sandboxes.c.running_since,
            sandboxes.c.vcpus,
            sandboxes.c.memory_mb,
        ).where(sandboxes.c.team_id == self._team_id, sandboxes.c.running_since.is_not(None))
        rows = await self._database.rows(union_all(ended, running))

        def found() -> Iterator[DayUsage]:
            for row in rows:
                if row.since is None:
                    yield DayUsage(row.day, row.running_us, row.vcpu_us, row.memory_mb_us)
                else:
                    yield from Run(row.vcpus, row.memory_mb, row.since, now).days()

        return by_day(first, last, found())
