"""Work that is carried through, repeated, raced."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from structlog.testing import capture_logs

from wrenn_sandbox.aio import beside, completed, every, first_of, shielded


class Work:
    """Ends when it is released, or fails."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.release = asyncio.Event()
        self.begun = asyncio.Event()
        self.ended = False
        self.cancelled = False
        self._failure = failure

    async def run(self) -> str:
        self.begun.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        self.ended = True
        if self._failure is not None:
            raise self._failure
        return "result"


Runner = Callable[[Coroutine[object, object, str]], Coroutine[object, object, str]]


async def _cancelled_twice(run: Runner, work: Work) -> "asyncio.Task[str]":
    task = asyncio.ensure_future(run(work.run()))
    await work.begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done()
    work.release.set()
    await asyncio.wait({task})
    return task


async def test_shielded_work_ends_before_a_cancellation_takes_effect() -> None:
    work = Work()
    task = await _cancelled_twice(shielded, work)
    assert work.ended
    assert task.cancelled()


async def test_completed_work_drops_a_cancellation() -> None:
    work = Work()
    task = await _cancelled_twice(completed, work)
    assert work.ended
    assert task.result() == "result"
    assert task.cancelling() == 0


@pytest.mark.parametrize("run", [shielded, completed])
async def test_results_and_failures_come_through(run: Runner) -> None:
    good, bad = Work(), Work(ValueError("said"))
    good.release.set()
    bad.release.set()
    assert await run(good.run()) == "result"
    with pytest.raises(ValueError, match="said"):
        await run(bad.run())


async def test_completed_work_that_fails_after_a_cancellation_fails() -> None:
    task = await _cancelled_twice(completed, Work(ValueError("said")))
    assert isinstance(task.exception(), ValueError)


async def test_work_is_repeated_although_it_fails() -> None:
    rounds = 0
    enough = asyncio.Event()

    async def work() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            enough.set()
        raise ValueError

    with capture_logs() as logs:
        task = asyncio.create_task(every(0.001, work, complaint="not done"))
        await asyncio.wait_for(enough.wait(), 10)
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()
    assert [each["event"] for each in logs[:3]] == ["not done"] * 3


async def test_a_round_ends_before_the_repetition_does() -> None:
    work = Work()

    async def once() -> None:
        await work.run()

    task = asyncio.create_task(every(0.0, once, complaint="not done"))
    await work.begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    work.release.set()
    await asyncio.wait({task})
    assert work.ended
    assert task.cancelled()


@pytest.fixture
def pair() -> tuple[Work, Work]:
    return Work(), Work()


async def test_the_loser_of_a_race_is_cancelled_at_the_end_of_the_block(
    pair: tuple[Work, Work],
) -> None:
    one, other = pair
    one.release.set()
    async with first_of(one.run(), other.run()) as (first, second):
        assert first.result() == "result"
        assert not second.done()
        assert not other.cancelled
    assert other.cancelled


async def test_both_are_cancelled_with_their_caller(pair: tuple[Work, Work]) -> None:
    async def race() -> None:
        async with first_of(pair[0].run(), pair[1].run()):
            pass

    task = asyncio.create_task(race())
    await pair[1].begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert all(each.cancelled for each in pair)


async def test_a_failure_of_the_loser_is_not_raised(pair: tuple[Work, Work]) -> None:
    async def fails_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError

    pair[0].release.set()
    async with first_of(pair[0].run(), fails_when_cancelled()) as (first, _):
        assert first.result() == "result"


async def test_a_cancellation_as_the_block_ends_does_not_lose_what_it_returns() -> None:
    async def started() -> str:
        async with beside(asyncio.sleep(0, "checked")) as checked:
            await checked
            asyncio.get_running_loop().call_soon(task.cancel)
            return "started"

    task = asyncio.create_task(started())
    await asyncio.wait({task})
    assert task.result() == "started"


async def test_work_beside_a_block_that_fails_is_cancelled() -> None:
    work = Work()

    async def failing() -> None:
        async with beside(work.run()):
            await work.begun.wait()
            raise LookupError

    with pytest.raises(LookupError):
        await failing()
    assert work.cancelled


async def test_a_failure_beside_a_block_that_fails_is_not_complained_about() -> None:
    """The suite fails on a complaint of asyncio about it."""
    work = Work(OSError("beside"))

    async def failing() -> None:
        async with beside(work.run()) as task:
            work.release.set()
            await asyncio.wait({task})
            raise LookupError

    with pytest.raises(LookupError):
        await failing()
