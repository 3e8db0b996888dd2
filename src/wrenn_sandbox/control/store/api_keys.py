"""API keys: stored as digests, owned by a team."""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import delete, insert, or_, select, update

from wrenn_sandbox.ids import KeyId, TeamId
from wrenn_sandbox.model.quota import check_api_keys

from .accounts import has_somebody
from .database import Database
from .quotas import QuotaTransaction
from .records import ApiKey, KeyOwner, Position, newest_first, record, values
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
        async with self._database.read() as connection:
            return [record(ApiKey, row) for row in await connection.execute(query)]

    async def remove(self, key_id: KeyId) -> bool:
        """Whether there was such a key."""
        async with self._database.write() as connection:
            result = await connection.execute(
                delete(api_keys).where(api_keys.c.id == key_id, api_keys.c.team_id == self._team_id)
            )
        return result.rowcount == 1


class ApiKeyDirectory:
    """Keys of every team, for the check of a presented key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def owner(self, digest: str) -> KeyOwner | None:
        """Whose key it is; None for a key that does not count."""
        async with self._database.read() as connection:
            row = (
                await connection.execute(_OWNER.where(api_keys.c.digest == digest))
            ).one_or_none()
        return None if row is None else record(KeyOwner, row)

    async def counts(self, key_id: KeyId) -> bool:
        """Whether the key is still there and its team has somebody who is not disabled."""
        async with self._database.read() as connection:
            query = _OWNER.where(api_keys.c.id == key_id)
            return (await connection.execute(query)).one_or_none() is not None

    async def touch(self, used: Mapping[KeyId, datetime]) -> None:
        """Move `last_used` of these keys forward.

        Rows are locked in the order of their ids, so that two such notes wait for each other once.
        """
        async with self._database.write() as connection:
            for key_id, at in sorted(used.items()):
                await connection.execute(
                    update(api_keys)
                    .where(
                        api_keys.c.id == key_id,
                        or_(api_keys.c.last_used.is_(None), api_keys.c.last_used < at),
                    )
                    .values(last_used=at)
                )
