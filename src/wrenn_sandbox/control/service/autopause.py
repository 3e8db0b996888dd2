"""Pauses sandboxes that nobody has used for their `timeout_sec`.

A command that runs in a sandbox uses it, also one that was left behind in the background. A failed
attempt leaves the sandbox running and its reason in the history; the next one comes
after 5, 10, 20, ... at most 300 seconds.
"""

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.control.metrics import Metrics
from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.patience import patience

from .activity import Activity
from .context import ControlContext
from .lifecycle import Lifecycle

_log = structlog.get_logger(__name__)
_LONGEST_SLEEP = timedelta(seconds=30)
_BUSY_RECHECK = timedelta(seconds=1)
_COMMANDS_RECHECK = timedelta(seconds=10)
_COMMANDS_SECONDS = 5.0
_FIRST_BACKOFF = timedelta(seconds=5)
_LONGEST_BACKOFF = timedelta(seconds=300)


@dataclass(frozen=True, slots=True)
class _Failure:
    not_before: datetime
    next_wait: timedelta


class AutoPause:
    def __init__(
        self,
        context: ControlContext,
        lifecycle: Lifecycle,
        activity: Activity,
        metrics: Metrics,
    ) -> None:
        self._store = context.store.all_sandboxes
        self._host = context.host
        self._lifecycle = lifecycle
        self._activity = activity
        self._metrics = metrics
        self._wakeup = context.wakeups.autopause
        self._clock = context.clock
        self._failures: dict[SandboxId, _Failure] = {}
        self._commands: dict[SandboxId, datetime] = {}
        """When to look again at sandboxes in which a command was running."""

    async def run(self) -> None:
        """Sleep until the next sandbox may be due, or until the wake-up is set."""
        while True:
            self._wakeup.clear()
            sleep = _LONGEST_SLEEP
            try:
                sleep = await shielded(self.sweep())
            except Exception:
                _log.exception("auto-pause failed")
            try:
                async with asyncio.timeout(sleep.total_seconds()):
                    await self._wakeup.wait()
            except TimeoutError:
                pass

    async def sweep(self) -> timedelta:
        """Pause what is due; gives the time until something else may be."""
        candidates = await self._store.with_timeout()
        self._failures = {
            each.id: self._failures[each.id] for each in candidates if each.id in self._failures
        }
        self._commands = {
            each.id: self._commands[each.id] for each in candidates if each.id in self._commands
        }
        async with asyncio.TaskGroup() as pauses:
            for sandbox in candidates:
                if self._due(sandbox) <= self._clock():
                    pauses.create_task(self._pause(sandbox))
        now = self._clock()
        rest = [self._due(sandbox) - now for sandbox in candidates if self._due(sandbox) > now]
        return min(rest, default=_LONGEST_SLEEP)

    def _due(self, sandbox: Sandbox) -> datetime:
        if sandbox.team_id in self._activity.users_of(sandbox.id):
            return self._clock() + _BUSY_RECHECK
        saved = sandbox.last_active_at or sandbox.last_updated
        latest = self._activity.latest(sandbox.id, saved) or saved
        due = latest + timedelta(seconds=sandbox.timeout_sec)
        failure = self._failures.get(sandbox.id)
        if failure is not None:
            due = max(due, failure.not_before)
        return max(due, self._commands.get(sandbox.id, due))

    async def _pause(self, sandbox: Sandbox) -> None:
        if await self._is_working(sandbox.id):
            self._commands[sandbox.id] = self._clock() + _COMMANDS_RECHECK
            return
        if self._commands.pop(sandbox.id, None) is not None:
            self._activity.touch(sandbox.id)  # the last one has ended just now
            return
        try:
            await self._lifecycle.pause(sandbox.id, "auto")
        except WrennError as error:
            self._failed(sandbox.id)
            _log.warning("auto-pause failed", sandbox_id=sandbox.id, error=error.message)
        except Exception:
            self._failed(sandbox.id)
            _log.exception("auto-pause failed", sandbox_id=sandbox.id)
        else:
            self._failures.pop(sandbox.id, None)
            self._metrics.auto_pause(done=True)

    async def _is_working(self, sandbox_id: SandboxId) -> bool:
        """Whether a command runs; a guest that does not say has none."""
        try:
            async with asyncio.timeout(patience(_COMMANDS_SECONDS)):
                return bool(await self._host.guest(sandbox_id).processes())
        except (WrennError, TimeoutError):
            return False

    def _failed(self, sandbox_id: SandboxId) -> None:
        before = self._failures.get(sandbox_id)
        wait = _FIRST_BACKOFF if before is None else before.next_wait
        self._failures[sandbox_id] = _Failure(self._clock() + wait, min(2 * wait, _LONGEST_BACKOFF))
        self._metrics.auto_pause(done=False)
