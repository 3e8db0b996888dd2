"""Whether this server is being drained: it takes nothing new, so that its machine can be serviced.

The wish is in the database, where `wrenn admin drain` writes it.
"""

from datetime import datetime
from typing import Final

import structlog

from wrenn_sandbox.aio import every
from wrenn_sandbox.control.metrics import Metrics
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.errors import NoCapacity

_log = structlog.get_logger(__name__)
_INTERVAL: Final = 1.0
_RETRY_AFTER: Final = 60.0


class Draining:
    """What the database said a second ago at most, as long as `run` runs."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._version: int | None = None
        self.since: datetime | None = None

    def refuse(self) -> None:
        """Raises `NoCapacity` where nothing may start."""
        if self.since is not None:
            raise NoCapacity(
                "This server is being drained; try again later", retry_after=_RETRY_AFTER
            )

    async def refresh(self) -> None:
        """Read what the operator wants, unless nothing has changed since the last time."""
        version = await self._store.version()
        if version is not None and version == self._version:
            return
        since = await self._store.installation.draining_since()
        self._version = version
        if (since is None) is not (self.since is None):
            _log.warning("draining" if since is not None else "not draining any more")
        self.since = since
        self._metrics.draining(since is not None)

    async def run(self) -> None:
        await every(_INTERVAL, self.refresh, complaint="whether to drain is not known")
