"""API keys: stored as digests, owned by a team."""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import delete, insert, select

from wrenn_sandbox.ids import KeyId, TeamId
from wrenn_sandbox.model.quota import check_api_keys

from .accounts import has_somebody
from .database import Database
from .quotas import QuotaTransaction
from .records import ApiKey, KeyOwner, Position, newest_first, values
from .tables import api_keys

_OWNER = select(api_keys.c.id.label("key_id"), api_keys.c.team_id, api_keys.c.last_used).where(
    has_somebody(api_keys.c.team_id)
)
"""Keys that count: those of a team in which somebody is not disabled."""


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

    async def page(self, limit: int | None, after: Position | None) -> list[ApiKey]:
        query = newest_first(
            select(api_keys).where(api_keys.c.team_id == self._team_id), api_keys, limit, after
        )
        return await self._database.records(ApiKey, query)

    async def remove(self, key_id: KeyId) -> bool:
        """Whether there was such a key."""
        this = (api_keys.c.id == key_id) & (api_keys.c.team_id == self._team_id)
        return await self._database.change(delete(api_keys).where(this)) == 1


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
