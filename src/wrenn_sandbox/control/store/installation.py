"""The identity of the database, made once and never changed, and whether to drain its server."""

from contextlib import suppress
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from wrenn_sandbox.ids import InstallationId

from .database import Database
from .tables import installation


class Installation:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def identity(self, candidate: InstallationId) -> InstallationId:
        """The identity; `candidate` becomes it where there is none yet."""
        query = select(installation.c.id)
        known = await self._database.row(query)
        if known is None:
            with suppress(IntegrityError):
                await self._database.change(insert(installation).values(number=1, id=candidate))
            known = await self._database.row(query)
        assert known is not None
        return InstallationId(known.id)

    async def draining_since(self) -> datetime | None:
        """Since when the operator wants nothing to run; None when things may run."""
        row = await self._database.row(select(installation.c.draining_since))
        return None if row is None else row.draining_since
