"""Writes down every few seconds what the hot path keeps in memory."""

import asyncio

import structlog

from .activity import Activity
from .api_keys import ApiKeyService
from .uninterrupted import uninterrupted

_log = structlog.get_logger(__name__)
_INTERVAL = 2.0


class LazyWrites:
    def __init__(self, activity: Activity, api_keys: ApiKeyService) -> None:
        self._activity = activity
        self._api_keys = api_keys

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            try:
                await uninterrupted(self.save())
            except Exception:
                _log.exception("activity not saved")

    async def save(self) -> None:
        await self._activity.save()
        await self._api_keys.save_use()
