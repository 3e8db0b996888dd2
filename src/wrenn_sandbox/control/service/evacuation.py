"""Pauses what may not run any more, one sandbox after the other.

That is everything while the server is drained, and at any time the sandboxes of teams whose users
are all disabled. What cannot be paused keeps running and is tried again a minute later.
"""

from datetime import datetime, timedelta
from typing import Final

import structlog

from wrenn_sandbox.aio import every
from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.model.sandbox import State

from .context import ControlContext
from .draining import Draining
from .lifecycle import Lifecycle
from .stop import pause_in_time

ADMIN: Final = "admin"
"""The actor of what is done to sandboxes because an operator wants it."""

DRAINED: Final = "the server is being drained"
NOBODY: Final = "every user of its team is disabled"
_log = structlog.get_logger(__name__)
_INTERVAL: Final = 1.0
_RETRY: Final = timedelta(minutes=1)


class Evacuation:
    """Each pause gets `timeout` seconds for each GiB begun of its sandbox's memory."""

    def __init__(self, context: ControlContext, lifecycle: Lifecycle, draining: Draining) -> None:
        self._store = context.store
        self._lifecycle = lifecycle
        self._draining = draining
        self._timeout = context.settings.stop_pause_timeout_sec
        self._clock = context.clock
        self._not_before: dict[SandboxId, datetime] = {}
        self._nobodys_until: int | None = None
        """The version of the database up to which no team was without users."""

    async def run(self) -> None:
        await every(_INTERVAL, self.sweep, complaint="evacuation failed")

    async def sweep(self) -> None:
        """Pause what may not run now, save for what failed within the last minute."""
        now = self._clock()
        self._not_before = {each: due for each, due in self._not_before.items() if due > now}
        version = await self._store.version()
        if version is None or version != self._nobodys_until:
            nobodys = await self._store.all_sandboxes.running_without_somebody()
            self._nobodys_until = None if nobodys else version
            await self._pause_all(nobodys, NOBODY)
        if self._draining.since is not None:
            await self._pause_all(
                await self._store.all_sandboxes.in_states([State.RUNNING]), DRAINED
            )

    async def _pause_all(self, sandboxes: list[Sandbox], reason: str) -> None:
        for sandbox in sandboxes:
            if reason == DRAINED and self._draining.since is None:
                return
            if sandbox.id in self._not_before:
                continue
            if await pause_in_time(self._lifecycle, sandbox, self._timeout, ADMIN, reason):
                _log.info("paused", sandbox_id=sandbox.id, reason=reason)
            else:
                self._not_before[sandbox.id] = self._clock() + _RETRY
