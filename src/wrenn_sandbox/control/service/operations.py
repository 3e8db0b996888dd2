"""Lifecycle work in tasks of its own: whoever asked for it may leave, the work goes on."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog

from wrenn_sandbox.aio import ended
from wrenn_sandbox.control.metrics import Timing
from wrenn_sandbox.errors import NoCapacity, WrennError
from wrenn_sandbox.ids import SandboxId

_log = structlog.get_logger(__name__)

Result = TypeVar("Result")


class Operations:
    """The set of lifecycle tasks by sandbox.

    The store's guarded transitions let only one of a sandbox's tasks do its work at a time, save
    for a deletion, which cuts the others short and waits for them.
    """

    def __init__(self) -> None:
        self._tasks: dict[SandboxId, set[asyncio.Task[object]]] = {}
        self._watchers: list[set[SandboxId]] = []
        self._closed = False

    def busy(self, sandbox_id: SandboxId) -> bool:
        return sandbox_id in self._tasks

    def start(
        self,
        sandbox_id: SandboxId,
        work: Coroutine[object, object, Result],
        *,
        of_stop: bool = False,
        timing: Timing | None = None,
    ) -> asyncio.Task[Result]:
        """Run `work` in a task of its own; `timing` ends with it.

        Raises `NoCapacity` when the server shuts down, save for what is part of that (`of_stop`).
        """
        if self._closed and not of_stop:
            work.close()
            raise NoCapacity("The server is shutting down; try again later", retry_after=5)
        task = asyncio.create_task(work, name=f"operation of {sandbox_id}")
        self._tasks.setdefault(sandbox_id, set()).add(task)
        task.add_done_callback(lambda done: self._ended(sandbox_id, done, timing))
        self._tell(sandbox_id)
        return task

    def run(
        self,
        sandbox_id: SandboxId,
        work: Coroutine[object, object, Result],
        *,
        of_stop: bool = False,
        timing: Timing | None = None,
    ) -> "asyncio.Future[Result]":
        """Run `work` to its end, whatever becomes of the caller, who awaits its result."""
        return asyncio.shield(self.start(sandbox_id, work, of_stop=of_stop, timing=timing))

    async def wait_for_others(self, sandbox_id: SandboxId) -> bool:
        """Wait for the other tasks of a sandbox; false when there was none."""
        others = self._tasks.get(sandbox_id, set()) - {asyncio.current_task()}
        if not others:
            return False
        await asyncio.wait(others)
        return True

    @contextmanager
    def watch(self) -> Iterator[set[SandboxId]]:
        """A set that holds every sandbox with an operation at any time during the block."""
        touched = set(self._tasks)
        self._watchers.append(touched)
        try:
            yield touched
        finally:
            self._watchers = [each for each in self._watchers if each is not touched]

    async def close(self, grace: float) -> None:
        """Accept nothing new, give what runs `grace` seconds, then cancel it; safe to repeat."""
        self._closed = True
        await ended({task for each in self._tasks.values() for task in each}, grace)

    def _ended(
        self, sandbox_id: SandboxId, task: asyncio.Task[object], timing: Timing | None
    ) -> None:
        tasks = self._tasks[sandbox_id]
        tasks.discard(task)
        if not tasks:
            del self._tasks[sandbox_id]
        self._tell(sandbox_id)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if timing is not None:
            timing.end(error)
        if task.cancelled():
            _log.warning("operation cancelled", sandbox_id=sandbox_id)
            return
        if isinstance(error, WrennError):
            if error.detail:
                _log.warning(
                    "operation failed",
                    sandbox_id=sandbox_id,
                    error=error.message,
                    detail=error.detail,
                )
        elif error is not None:
            _log.error("operation failed", sandbox_id=sandbox_id, exc_info=error)

    def _tell(self, sandbox_id: SandboxId) -> None:
        for touched in self._watchers:
            touched.add(sandbox_id)
