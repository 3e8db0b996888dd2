"""API keys: stored as digests, owned by a team."""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.ids import KeyId, TeamId
from wrenn_sandbox.model.events import KEY_CREATED, KEY_DELETED
from wrenn_sandbox.model.quota import check_api_keys

from .accounts import has_somebody
from .database import Database
from .quotas import QuotaTransaction
from .records import ApiKey, KeyOwner, Position, newest_first, values
from .tables import api_keys
from .team_events import record_event

_OWNER = select(api_keys.c.id.label("key_id"), api_keys.c.team_id, api_keys.c.last_used).where(
    has_somebody(api_keys.c.team_id)
)
"""Keys that count: those of a team in which somebody is not disabled."""


async def remove_keys(
    connection: AsyncConnection,
    team_id: TeamId,
    now: datetime,
    actor: str,
    *conditions: ColumnElement[bool],
) -> int:
    """Remove the keys of a team that meet the conditions, and tell it; gives how many.

    The team's row is locked.
    """
    removed = delete(api_keys).where(api_keys.c.team_id == team_id, *conditions)
    rows = (await connection.execute(removed.returning(api_keys.c.id, api_keys.c.name))).all()
    for row in rows:
        await _tell(connection, team_id, KEY_DELETED, now, row.id, row.name, actor)
    return len(rows)


async def _tell(
    connection: AsyncConnection,
    team_id: TeamId,
    type: str,
    at: datetime,
    key_id: str,
    name: str,
    actor: str = "user",
) -> None:
    told = {"api_key_id": key_id, "name": name, "actor": actor}
    await record_event(connection, team_id, type, at, told)


class TeamApiKeys:
    """The keys of one team."""

    def __init__(self, database: Database, team_id: TeamId, guard: QuotaTransaction) -> None:
        self._database = database
        self._team_id = team_id
        self._guard = guard

    async def add(self, key: ApiKey, digest: str) -> None:
        """Raises `QuotaExceeded`."""
        async with self._guard.write(self._team_id, check_api_keys) as connection:
            await connection.execute(insert(api_keys).values(digest=digest, **values(key)))
            await _tell(connection, self._team_id, KEY_CREATED, key.created_at, key.id, key.name)

    async def page(self, limit: int | None, after: Position | None) -> list[ApiKey]:
        query = newest_first(
            select(api_keys).where(api_keys.c.team_id == self._team_id), api_keys, limit, after
        )
        return await self._database.records(ApiKey, query)

    async def remove(self, key_id: KeyId, now: datetime) -> bool:
        """Whether there was such a key."""
        async with self._guard.write(self._team_id) as connection:
            this = api_keys.c.id == key_id
            return await remove_keys(connection, self._team_id, now, "user", this) == 1


class ApiKeyDirectory:
    """Keys of every team, for the check of a presented key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def owner(self, digest: str) -> KeyOwner | None:
        """Whose key it is; None for a key that does not count."""
        return await self._database.record(KeyOwner, _OWNER.where(api_keys.c.digest == digest))

    async def counts(self, key_id: KeyId) -> bool:
        """Whether the key is still there and its team has somebody who is not disabled."""
        return await self._database.row(_OWNER.where(api_keys.c.id == key_id)) is not None

    async def touch(self, used: Mapping[KeyId, datetime]) -> None:
        """Move `last_used` of these keys forward."""
        await self._database.move_forward(api_keys, "last_used", used.items())
