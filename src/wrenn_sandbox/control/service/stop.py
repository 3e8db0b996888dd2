"""Pauses everything that runs when the server stops, for hosts that are about to go down."""

import asyncio
from typing import Final

import structlog

from wrenn_sandbox.aio import first_of
from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.patience import patience

from .context import ControlContext
from .lifecycle import SHUTDOWN, Lifecycle

_log = structlog.get_logger(__name__)
_AT_ONCE: Final = 4
_MB_PER_GIB: Final = 1024


async def pause_in_time(
    lifecycle: Lifecycle, sandbox: Sandbox, per_gib: float, actor: str, reason: str | None = None
) -> bool:
    """Pause a sandbox within `per_gib` seconds for each GiB begun of its memory.

    False where it keeps running; the log says why.
    """
    limit = patience(per_gib) * -(-sandbox.memory_mb // _MB_PER_GIB)
    try:
        async with asyncio.timeout(limit):
            await lifecycle.pause(sandbox.id, actor, reason)
    except TimeoutError:
        _log.warning("not paused in time", sandbox_id=sandbox.id, seconds=limit)
    except WrennError as error:
        _log.warning("not paused", sandbox_id=sandbox.id, error=error.message)
    except Exception:
        _log.exception("not paused", sandbox_id=sandbox.id)
    else:
        return True
    return False


class PauseAtStop:
    """Each pause gets `timeout` seconds for each GiB begun of its sandbox's memory."""

    def __init__(self, context: ControlContext, lifecycle: Lifecycle) -> None:
        self._store = context.store.all_sandboxes
        self._lifecycle = lifecycle
        self._timeout = context.settings.stop_pause_timeout_sec
        self._skip = asyncio.Event()

    def skip(self) -> None:
        """Leave what is not paused yet running, now or when `run` is called."""
        self._skip.set()

    async def run(self) -> None:
        """Pause all running sandboxes, a few at a time; those that fail keep running."""
        async with first_of(self._pause_all(), self._skip.wait()) as (pauses, _):
            if pauses.done():
                pauses.result()

    async def _pause_all(self) -> None:
        running = await self._store.in_states([State.RUNNING])
        if running:
            _log.info("pausing all sandboxes", running=len(running))
        turn = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for sandbox in running:
                group.create_task(self._pause(sandbox, turn))

    async def _pause(self, sandbox: Sandbox, turn: asyncio.Semaphore) -> None:
        async with turn:
            await pause_in_time(self._lifecycle, sandbox, self._timeout, SHUTDOWN)
