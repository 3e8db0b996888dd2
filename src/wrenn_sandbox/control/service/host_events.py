"""Listens to the host: a machine that ended by itself is recorded at once.

Where its guest stopped, the sandbox is paused from then on, to be resumed without memory.
"""

import asyncio
from typing import Final

import structlog

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.control.store.sandboxes import Change, Missing
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.model.sandbox import Event, IllegalTransition
from wrenn_sandbox.wire.messages import EventKind, HostEvent

from .context import ControlContext

_log = structlog.get_logger(__name__)
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 30.0
_CHANGES: Final = {
    EventKind.EXITED: (Event.LOST,),
    EventKind.STOPPED: (Event.PAUSE, Event.PAUSED),
}


class HostEvents:
    def __init__(self, context: ControlContext) -> None:
        self._store = context.store.all_sandboxes
        self._host = context.host
        self._operations = context.operations
        self._metrics = context.metrics
        self._wakeup = context.wakeups.reconciler

    async def run(self) -> None:
        """Follow the host's events for ever; after a failure wait longer and longer."""
        epoch, last, wait = "", 0, _FIRST_WAIT
        while True:
            try:
                found = await self._host.events(epoch, last)
                for event in found.events:
                    await shielded(self._handle(event))
                    epoch, last = found.epoch, event.number
                    self._metrics.guest_failure(event.kind.value)
                wait = _FIRST_WAIT
                if not found.events:
                    await asyncio.sleep(wait)
            except Exception:
                _log.exception("host events not readable")
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)

    async def _handle(self, event: HostEvent) -> None:
        if self._operations.busy(event.sandbox_id):
            self._wakeup.set()
            return
        changes = [Change(each, "host", event.at, event.reason) for each in _CHANGES[event.kind]]
        try:
            await self._operations.run(
                event.sandbox_id, self._store.apply(event.sandbox_id, *changes)
            )
        except (IllegalTransition, Missing):
            _log.info("exit of a sandbox that was ending", sandbox_id=event.sandbox_id)
        except WrennError as error:
            _log.warning("exit not recorded", sandbox_id=event.sandbox_id, error=error.message)
