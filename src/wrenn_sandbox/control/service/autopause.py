"""Pauses sandboxes that nobody has used for their `timeout_sec`.

A command that runs in a sandbox uses it, also one that was left behind in the background. A failed
attempt leaves the sandbox running and its reason in the history; the next one comes
after 5, 10, 20, ... at most 300 seconds.
"""

import asyncio
from datetime import datetime, timedelta
from functools import partial

from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.patience import patience

from .activity import Activity
from .context import ControlContext
from .lifecycle import Lifecycle
from .timers import LONGEST_SLEEP, Attempts

_BUSY_RECHECK = timedelta(seconds=1)
_COMMANDS_RECHECK = timedelta(seconds=10)
_COMMANDS_SECONDS = 5.0


class AutoPause:
    def __init__(
        self,
        context: ControlContext,
        lifecycle: Lifecycle,
        activity: Activity,
    ) -> None:
        self._store = context.store.all_sandboxes
        self._host = context.host
        self._lifecycle = lifecycle
        self._activity = activity
        self._metrics = context.metrics
        self._clock = context.clock
        self._attempts = Attempts(context.clock, context.wakeups.autopause, "auto-pause failed")
        self._commands: dict[SandboxId, datetime] = {}
        """When to look again at sandboxes in which a command was running."""

    async def run(self) -> None:
        """Sleep until the next sandbox may be due, or until the wake-up is set."""
        await self._attempts.run(self._begin)

    async def sweep(self) -> timedelta:
        """Pause what is due, to the end; gives the time until something else may be."""
        return await self._attempts.sweep(self._begin)

    async def _begin(self) -> timedelta:
        under_way = self._attempts.under_way()
        candidates = await self._store.with_timeout()
        self._attempts.keep({each.id for each in candidates})
        self._commands = {
            each.id: self._commands[each.id] for each in candidates if each.id in self._commands
        }
        waiting = [each for each in candidates if each.id not in under_way]
        for sandbox in waiting:
            if self._due(sandbox) <= self._clock():
                self._attempts.start(sandbox.id, self._pause(sandbox))
        now = self._clock()
        rest = [self._due(sandbox) - now for sandbox in waiting if self._due(sandbox) > now]
        return min(rest, default=LONGEST_SLEEP)

    def _due(self, sandbox: Sandbox) -> datetime:
        if sandbox.team_id in self._activity.users_of(sandbox.id):
            return self._clock() + _BUSY_RECHECK
        saved = sandbox.last_active_at or sandbox.last_updated
        latest = self._activity.latest(sandbox.id, saved) or saved
        due = latest + timedelta(seconds=sandbox.timeout_sec)
        due = self._attempts.not_before(sandbox.id, due)
        return max(due, self._commands.get(sandbox.id, due))

    async def _pause(self, sandbox: Sandbox) -> bool:
        """Whether it was paused."""
        if await self._is_working(sandbox.id):
            self._commands[sandbox.id] = self._clock() + _COMMANDS_RECHECK
            return False
        if self._commands.pop(sandbox.id, None) is not None:
            self._activity.touch(sandbox.id)  # the last one has ended just now
            return False
        pause = partial(self._lifecycle.pause, sandbox.id, "auto")
        done = await self._attempts.make(sandbox.id, pause)
        self._metrics.auto_pause(done=done)
        return done

    async def _is_working(self, sandbox_id: SandboxId) -> bool:
        """Whether a command runs; a guest that does not say has none."""
        try:
            async with asyncio.timeout(patience(_COMMANDS_SECONDS)):
                return bool(await self._host.guest(sandbox_id).processes())
        except (WrennError, TimeoutError):
            return False
