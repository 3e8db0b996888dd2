"""Steps of background tasks that a shutdown waits for instead of cutting them short."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

Result = TypeVar("Result")


async def uninterrupted(work: Coroutine[object, object, Result]) -> Result:
    """Run `work` to its end; a cancellation that comes meanwhile takes effect afterwards.

    A query that is cut short leaves its connection in the middle of an answer.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
