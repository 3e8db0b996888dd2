"""API keys of a team, and the check of a presented one."""

from datetime import timedelta

from wrenn_sandbox.control.store.records import ApiKey, Position
from wrenn_sandbox.errors import NotFound, Unauthorized
from wrenn_sandbox.ids import (
    KeyId,
    TeamId,
    api_key_digest,
    api_key_prefix,
    is_id,
    new_api_key,
    new_key_id,
    plain_api_key,
)

from .activity import Activity
from .callers import Caller
from .context import ControlContext

_LAST_USED_STEP = timedelta(minutes=1)


class ApiKeyService:
    def __init__(self, context: ControlContext, activity: Activity) -> None:
        self._store = context.store
        self._clock = context.clock
        self._activity = activity

    async def create(self, team_id: TeamId, name: str) -> tuple[ApiKey, str]:
        """The new key's record and the key itself, which is not kept."""
        key = new_api_key()
        record = ApiKey(
            id=new_key_id(),
            team_id=team_id,
            name=name,
            key_prefix=api_key_prefix(key),
            created_at=self._clock(),
            last_used=None,
        )
        await self._store.team(team_id).api_keys.add(record, api_key_digest(key))
        return record, key

    async def page(
        self, team_id: TeamId, limit: int | None, after: Position | None
    ) -> list[ApiKey]:
        return await self._store.team(team_id).api_keys.page(limit, after)

    async def delete(self, team_id: TeamId, key_id: str) -> None:
        """The key stops working at once; raises `NotFound`."""
        if not is_id("key", key_id) or not await self._store.team(team_id).api_keys.remove(
            KeyId(key_id), self._clock()
        ):
            raise NotFound("There is no such API key")

    async def caller_of_key(self, key: str) -> Caller:
        """Whom a presented key acts for, in either spelling; raises `Unauthorized`."""
        plain = plain_api_key(key)
        owner = None if plain is None else await self._store.keys.owner(api_key_digest(plain))
        if owner is None:
            raise Unauthorized("The API key is not valid, or was deleted; create another one")
        now = self._clock()
        if owner.last_used is None or now - owner.last_used >= _LAST_USED_STEP:
            self._activity.touch_key(owner.key_id, now)
        return Caller(owner.team_id, owner.key_id)
