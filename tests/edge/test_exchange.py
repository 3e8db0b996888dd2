"""An exchange with a guest that never lets the server wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext

import pytest
from starlette.types import Message

from support.guest_double import GuestDouble, GuestState, Port
from support.lag import Lag
from wrenn_sandbox.edge.exchange import Exchange
from wrenn_sandbox.edge.head import Origin
from wrenn_sandbox.errors import Unauthorized
from wrenn_sandbox.ids import new_sandbox_id
from wrenn_sandbox.patience import patience

_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _run(play: Port, over: asyncio.Event | None = None) -> int:
    """How many bytes of the body a client got that asked for nothing but this."""
    state = GuestState()
    state.ports[3000] = play
    asked = False
    got = 0

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal got
        got += len(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "headers": [(b"host", b"a")], "state": {}}
    exchange = Exchange(scope, receive, send, Origin("192.0.2.1", "http", own=True))
    await exchange.run(
        GuestDouble(state, new_sandbox_id()),
        3000,
        b"/",
        life="one",
        place=nullcontext,
        idle_sec=600,
        over=over,
    )
    return got


async def test_an_answer_in_crumbs_does_not_hold_up_others() -> None:
    async def crumbs(_: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield _HEAD
        for _number in range(60):
            yield b"1\r\nx\r\n" * 40_000
        yield b"0\r\n\r\n"

    lag = Lag()
    await asyncio.sleep(0.01)
    assert await _run(crumbs) == 60 * 40_000
    await asyncio.sleep(0.01)
    assert await lag.end() < 0.05


async def test_a_credential_that_ends_ends_an_answer_that_does_not() -> None:
    async def endless(_: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield _HEAD
        while True:
            await asyncio.sleep(0)
            yield b"1\r\nx\r\n"

    over = asyncio.Event()
    running = asyncio.create_task(_run(endless, over))
    await asyncio.sleep(0.05)
    over.set()
    async with asyncio.timeout(patience(5)):
        with pytest.raises(Unauthorized):
            await running
