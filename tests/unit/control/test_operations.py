"""Operations: they outlive their callers and end with the server."""

import asyncio

import pytest

from wrenn_sandbox.control.service.operations import Operations
from wrenn_sandbox.errors import NoCapacity
from wrenn_sandbox.ids import SandboxId

_ONE, _TWO = SandboxId("sb-one"), SandboxId("sb-two")


async def test_work_outlives_its_caller() -> None:
    operations, opened, done = Operations(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await opened.wait()
        done.set()

    caller = asyncio.create_task(operations.run(_ONE, work()))
    await asyncio.sleep(0)
    assert operations.busy(_ONE)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    opened.set()
    await done.wait()
    assert not await operations.wait_for_others(_TWO)
    await operations.wait_for_others(_ONE)
    assert not operations.busy(_ONE)


async def test_a_watch_sees_what_was_and_what_came() -> None:
    operations, opened = Operations(), asyncio.Event()
    first = operations.start(_ONE, opened.wait())
    with operations.watch() as touched:
        assert touched == {_ONE}
        opened.set()
        await operations.run(_TWO, asyncio.sleep(0))
        assert touched == {_ONE, _TWO}
    await first


async def test_a_close_waits_and_then_cancels() -> None:
    operations = Operations()
    quick = operations.start(_ONE, asyncio.sleep(0, "done"))
    slow = operations.start(_TWO, asyncio.Event().wait())
    await operations.close(grace=0.05)
    assert quick.result() == "done"
    assert slow.cancelled()
    with pytest.raises(NoCapacity):
        operations.start(_ONE, asyncio.sleep(0))


async def test_watches_do_not_end_each_other() -> None:
    operations = Operations()
    with operations.watch() as outer:
        with operations.watch() as inner:
            assert inner == outer == set()
        await operations.run(_ONE, asyncio.sleep(0))
    assert (outer, inner) == ({_ONE}, set())
