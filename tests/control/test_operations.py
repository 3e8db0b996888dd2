"""Operations: they outlive their callers and end with the server."""

import asyncio

import pytest
from structlog.testing import capture_logs

from wrenn_sandbox.control.service.operations import Operations
from wrenn_sandbox.errors import HostFailure, NoCapacity, WrennError
from wrenn_sandbox.ids import SandboxId

_ONE, _TWO = SandboxId("sb-one"), SandboxId("sb-two")


async def test_work_outlives_its_caller() -> None:
    operations, opened, done = Operations(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await opened.wait()
        done.set()

    caller = operations.run(_ONE, work())
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


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (HostFailure("It did not start.", detail="/run/x: no such file"), True),
        (NoCapacity("The host is full.", retry_after=5), False),
    ],
)
async def test_the_log_says_what_a_caller_is_not_told(error: WrennError, logged: bool) -> None:
    operations = Operations()

    async def work() -> None:
        raise error

    with capture_logs() as logs:
        with pytest.raises(type(error)):
            await operations.run(_ONE, work())
        await asyncio.sleep(0)
    expected = {
        "event": "operation failed",
        "log_level": "warning",
        "sandbox_id": _ONE,
        "error": error.message,
        "detail": error.detail,
    }
    assert logs == ([expected] if logged else [])
