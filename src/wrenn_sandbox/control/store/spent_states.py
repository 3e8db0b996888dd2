"""OAuth states that have been used: each counts once, whatever server it comes to."""

from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from .database import Database
from .tables import spent_states

_SKEW: Final = timedelta(minutes=10)
"""How far apart the clocks of servers with one database may be."""


class SpentStates:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def spend(self, state: str, expires_at: datetime, now: datetime) -> bool:
        """Whether this is the first use; remembered until nobody takes the state any more."""
        forgotten = (
            select(spent_states.c.state)
            .where(spent_states.c.expires_at <= now - _SKEW)
            .with_for_update(skip_locked=True)
        )
        try:
            async with self._database.write() as connection:
                await connection.execute(
                    insert(spent_states).values(state=state, expires_at=expires_at)
                )
                await connection.execute(
                    delete(spent_states).where(spent_states.c.state.in_(forgotten))
                )
        except IntegrityError:
            return False
        return True
