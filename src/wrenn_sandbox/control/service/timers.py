"""What happens to sandboxes at a time of their own: how its tasks sleep, and try again."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import structlog

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.control.clock import Clock
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.ids import SandboxId

Begin = Callable[[], Coroutine[object, object, timedelta]]
"""Starts what is due; gives the time until something else may be."""

_log = structlog.get_logger(__name__)
LONGEST_SLEEP: Final = timedelta(seconds=30)
_FIRST_BACKOFF: Final = timedelta(seconds=5)
_LONGEST_BACKOFF: Final = timedelta(seconds=300)


@dataclass(frozen=True, slots=True)
class _Failure:
    not_before: datetime
    next_wait: timedelta


class Attempts:
    """What is due is done beside everything else: what takes long holds up no other sandbox.

    What failed is tried again after 5, 10, 20, ... at most 300 seconds.
    """

    def __init__(self, clock: Clock, wakeup: asyncio.Event, complaint: str) -> None:
        self._clock = clock
        self._wakeup = wakeup
        self._complaint = complaint
        self._failures: dict[SandboxId, _Failure] = {}
        self._under_way: dict[SandboxId, asyncio.Task[bool]] = {}

    async def run(self, begin: Begin) -> None:
        """Do `begin`, sleep for the time that it gives or until the wake-up is set, and so on.

        At the end nothing is waited for: operations that have begun go on.
        """
        try:
            while True:
                self._wakeup.clear()
                sleep = LONGEST_SLEEP
                try:
                    sleep = await shielded(begin())
                except Exception:
                    _log.exception(self._complaint)
                try:
                    async with asyncio.timeout(sleep.total_seconds()):
                        await self._wakeup.wait()
                except TimeoutError:
                    pass
        finally:
            for task in self._under_way.values():
                task.cancel()
            await self._settled()

    async def sweep(self, begin: Begin) -> timedelta:
        """Do `begin` once, and what it starts to its end; gives what it would give then."""
        await begin()
        await self._settled()
        return await begin()

    def keep(self, candidates: Collection[SandboxId]) -> None:
        """Forget the failures of all other sandboxes, save for those that are tried just now."""
        self._failures = {
            each: failure
            for each, failure in self._failures.items()
            if each in candidates or each in self._under_way
        }

    def not_before(self, sandbox_id: SandboxId, due: datetime) -> datetime:
        """When what is due then may be tried."""
        failure = self._failures.get(sandbox_id)
        return due if failure is None else max(due, failure.not_before)

    def under_way(self) -> frozenset[SandboxId]:
        """The sandboxes for which something is being done."""
        return frozenset(self._under_way)

    def start(self, sandbox_id: SandboxId, attempt: Coroutine[object, object, bool]) -> None:
        """Begin an attempt; the wake-up is set at its end unless it gives that all is done."""
        task = asyncio.create_task(attempt, name=f"timer of {sandbox_id}")
        self._under_way[sandbox_id] = task
        task.add_done_callback(partial(self._ended, sandbox_id))

    async def make(self, sandbox_id: SandboxId, work: Callable[[], Awaitable[object]]) -> bool:
        """Whether `work` succeeded; the log says why it did not."""
        try:
            await work()
        except WrennError as error:
            _log.warning(self._complaint, sandbox_id=sandbox_id, error=error.message)
        except Exception:
            _log.exception(self._complaint, sandbox_id=sandbox_id)
        else:
            self._failures.pop(sandbox_id, None)
            return True
        before = self._failures.get(sandbox_id)
        wait = _FIRST_BACKOFF if before is None else before.next_wait
        self._failures[sandbox_id] = _Failure(self._clock() + wait, min(2 * wait, _LONGEST_BACKOFF))
        return False

    async def _settled(self) -> None:
        while self._under_way:
            await asyncio.wait(self._under_way.values())

    def _ended(self, sandbox_id: SandboxId, task: "asyncio.Task[bool]") -> None:
        del self._under_way[sandbox_id]
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            _log.error(self._complaint, sandbox_id=sandbox_id, exc_info=error)
        elif not task.result():
            self._wakeup.set()
