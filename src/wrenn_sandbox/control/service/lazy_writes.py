"""Writes down every few seconds what the hot path keeps in memory."""

from .activity import Activity
from .api_keys import ApiKeyService
from .repeated import repeated

_INTERVAL = 2.0


class LazyWrites:
    def __init__(self, activity: Activity, api_keys: ApiKeyService) -> None:
        self._activity = activity
        self._api_keys = api_keys

    async def run(self) -> None:
        await repeated(self.save, every=_INTERVAL, complaint="activity not saved")

    async def save(self) -> None:
        await self._activity.save()
        await self._api_keys.save_use()
