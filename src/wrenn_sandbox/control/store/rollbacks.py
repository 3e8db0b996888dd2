"""Rollbacks under way, of every team."""

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.quota import Quota, Usage, check_disk, check_machines
from wrenn_sandbox.model.sandbox import Status

from . import sandboxes
from .database import Database
from .quotas import QuotaTransaction
from .records import Rollback, Sandbox, values
from .tables import rollbacks


class Rollbacks:
    """For the platform's own work: sandboxes of every team."""

    def __init__(self, database: Database, guard: QuotaTransaction) -> None:
        self._database = database
        self._guard = guard

    async def begin(self, team_id: TeamId, rollback: Rollback, change: sandboxes.Change) -> Sandbox:
        """Mark the sandbox and write down what is done to it, in one transaction.

        Raises `Missing` or `IllegalTransition` for the sandbox and, where it was paused,
        `QuotaExceeded` for the team.
        """
        sandbox: Sandbox | None = None

        def check(quota: Quota, usage: Usage) -> None:
            if sandbox is not None and sandbox.status is Status.PAUSED:
                check_machines(quota, usage)
                check_disk(quota, usage)

        async with self._guard.write(team_id, check) as connection:
            sandbox = await sandboxes.apply(connection, rollback.sandbox_id, change)
            await _forget(connection, rollback.sandbox_id)
            await connection.execute(insert(rollbacks).values(values(rollback)))
        return sandbox

    async def end(self, sandbox_id: SandboxId, change: sandboxes.Change) -> Sandbox:
        """Record the outcome; raises `Missing` or `IllegalTransition`."""
        team_id = await self._guard.team_of(sandbox_id)
        if team_id is None:
            raise sandboxes.Missing(sandbox_id)
        async with self._guard.write(team_id) as connection:
            await _forget(connection, sandbox_id)
            return await sandboxes.apply(connection, sandbox_id, change)

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Give up a rollback of a sandbox that went another way."""
        async with self._database.write() as connection:
            await _forget(connection, sandbox_id)

    async def all(self) -> list[Rollback]:
        return await self._database.records(Rollback, select(rollbacks))


async def _forget(connection: AsyncConnection, sandbox_id: SandboxId) -> None:
    await connection.execute(delete(rollbacks).where(rollbacks.c.sandbox_id == sandbox_id))
