"""Pauses or deletes sandboxes at their deadlines, whatever they are doing then.

A minute before, the history of a sandbox notes that it is near. A deadline that came while the
server was down is acted on at the next start.
"""

from datetime import datetime, timedelta
from functools import partial
from typing import Final

from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.model.sandbox import OnDeadline

from .context import ControlContext
from .lifecycle import Lifecycle
from .timers import LONGEST_SLEEP, Attempts

ACTOR: Final = "deadline"
REASON: Final = "its deadline has come"
_NEAR: Final = timedelta(minutes=1)


class Deadlines:
    def __init__(self, context: ControlContext, lifecycle: Lifecycle) -> None:
        self._store = context.store.all_sandboxes
        self._lifecycle = lifecycle
        self._clock = context.clock
        self._attempts = Attempts(context.clock, context.wakeups.deadlines, "deadline missed")

    async def run(self) -> None:
        """Sleep until something may be due, or until the wake-up is set."""
        await self._attempts.run(self._begin)

    async def sweep(self) -> timedelta:
        """Act on what is due, to the end; gives the time until something else may be."""
        return await self._attempts.sweep(self._begin)

    async def _begin(self) -> timedelta:
        under_way = self._attempts.under_way()
        candidates = await self._store.with_deadline()
        self._attempts.keep({each.id for each in candidates})
        waiting = [each for each in candidates if each.id not in under_way]
        for sandbox in waiting:
            now = self._clock()
            if self._due(sandbox) <= now:
                self._attempts.start(sandbox.id, self._act(sandbox))
            elif _near(sandbox) <= now < _deadline(sandbox):
                await self._store.tell_deadline(sandbox, ACTOR, now)
        now = self._clock()
        times = [each(sandbox) for sandbox in waiting for each in (_near, self._due)]
        return min([LONGEST_SLEEP, *(time - now for time in times if time > now)])

    def _due(self, sandbox: Sandbox) -> datetime:
        return self._attempts.not_before(sandbox.id, _deadline(sandbox))

    async def _act(self, sandbox: Sandbox) -> bool:
        deletes = sandbox.on_deadline is OnDeadline.DELETE
        act = self._lifecycle.delete if deletes else self._lifecycle.pause
        return await self._attempts.make(
            sandbox.id, partial(act, sandbox.id, ACTOR, REASON, _deadline(sandbox))
        )


def _deadline(sandbox: Sandbox) -> datetime:
    assert sandbox.deadline_at is not None
    return sandbox.deadline_at


def _near(sandbox: Sandbox) -> datetime:
    return _deadline(sandbox) - _NEAR
