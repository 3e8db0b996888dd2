"""Background work that is done again and again, whatever became of it the last time."""

import asyncio
from collections.abc import Callable, Coroutine

import structlog

from .uninterrupted import uninterrupted

_log = structlog.get_logger(__name__)


async def repeated(
    work: Callable[[], Coroutine[object, object, None]], *, every: float, complaint: str
) -> None:
    """Wait `every` seconds and do `work`, for ever; a failure is logged as `complaint`."""
    while True:
        await asyncio.sleep(every)
        try:
            await uninterrupted(work())
        except Exception:
            _log.exception(complaint)
