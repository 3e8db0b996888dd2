"""Idioms of asyncio that the whole platform uses: work that is carried through, repeated, raced."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

import structlog

T = TypeVar("T")
U = TypeVar("U")

_log = structlog.get_logger(__name__)


async def shielded(work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end; a cancellation that comes meanwhile takes effect afterwards.

    A query that is cut short, for example, leaves its connection in the middle of an answer.
    """
    task = asyncio.create_task(work)
    cancelled = await _cancelled_until(task)
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()


async def completed(work: Coroutine[object, object, T]) -> T:
    """Run `work` to its end; a cancellation that comes meanwhile is dropped.

    For a step that cannot be undone once it is done: its caller has to learn that it is.
    """
    current, task = asyncio.current_task(), asyncio.create_task(work)
    assert current is not None
    before = current.cancelling()
    await _cancelled_until(task)
    while current.cancelling() > before:
        current.uncancel()
    return task.result()


async def ended(tasks: Collection["asyncio.Task[T]"], grace: float) -> None:
    """Give these tasks `grace` seconds, cancel what runs then, and wait until it has ended."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=grace)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)


async def in_thread(work: Callable[[], T], given_up: threading.Event) -> T:
    """Do `work` in a thread; a cancellation tells it by the event, and waits for its end."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        given_up.set()
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _cancelled_until(task: "asyncio.Task[T]") -> asyncio.CancelledError | None:
    """Wait for a task; the first cancellation of the caller that came meanwhile."""
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
    return cancelled


async def every(
    seconds: float, work: Callable[[], Coroutine[object, object, None]], *, complaint: str
) -> None:
    """Wait `seconds` and do `work`, for ever; a failure is logged as `complaint`.

    A cancellation takes effect between two rounds.
    """
    while True:
        await asyncio.sleep(seconds)
        try:
            await shielded(work())
        except Exception:
            _log.exception(complaint)


@asynccontextmanager
async def beside(work: Coroutine[object, object, T]) -> AsyncIterator["asyncio.Task[T]"]:
    """Do `work` while the block runs; when the block is left it has ended, or is cancelled.

    A block that has awaited the task is left without a pause: no cancellation comes in between.
    """
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()


@asynccontextmanager
async def first_of(
    one: Awaitable[T], other: Awaitable[U]
) -> AsyncIterator[tuple["asyncio.Future[T]", "asyncio.Future[U]"]]:
    """Both as they are when the first of them has ended; the block's end cancels what goes on."""
    tasks = asyncio.ensure_future(one), asyncio.ensure_future(other)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
