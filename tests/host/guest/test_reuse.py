"""Connections to a guest are used again, but never one on which anything else has come."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from support.scripted_guest import HEALTHY, Guest, a_guest
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.guest.connection import GuestGone

_JSON = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
_STREAM = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"7\r\n\x00\x00\x00\x00\x02{}\r\n7\r\n\x02\x00\x00\x00\x02{}\r\n0\r\n\r\n"
)
_LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"


Come = Callable[[socket.socket], None]


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with a_guest() as guest:
        yield guest


def say(data: bytes) -> Come:
    return lambda end: end.sendall(data)


_COMES = pytest.mark.parametrize(
    "come",
    [socket.socket.close, say(b"x"), say(b"\r\n"), say(b"HTTP/1.1 "), say(HEALTHY), say(_JSON)],
    ids=["end", "byte", "line", "half", "empty", "whole"],
)


@pytest.mark.parametrize("answer", [HEALTHY, _JSON, _CHUNKED])
async def test_a_connection_is_used_again(answer: bytes, guest: Guest) -> None:
    bodies = [await guest.call(answer) for _ in range(3)]
    assert bodies == [b"" if answer == HEALTHY else b"{}"] * 3
    assert len(guest.ends) == 1


async def _stream(guest: Guest, *, whole: bool) -> list[bytes]:
    """The messages that were read of a stream of one; all, or the first and not the end."""
    read = []

    async def follow() -> None:
        async with guest.client.stream("stream", {}) as messages:
            async for message in messages:
                read.append(message)
                if not whole:
                    return

    following = asyncio.create_task(follow())
    (await guest.asked()).sendall(_STREAM)
    await following
    return read


async def test_a_stream_that_was_read_to_its_end_leaves_its_connection(guest: Guest) -> None:
    assert await _stream(guest, whole=True) == [b"{}"]
    assert await guest.call(_JSON) == b"{}"
    assert len(guest.ends) == 1


async def test_a_stream_that_was_left_takes_its_connection_along(guest: Guest) -> None:
    """All of the answer has come, yet what was not read would be the next call's."""
    assert await _stream(guest, whole=False) == [b"{}"]
    assert await guest.call(_JSON) == b"{}"
    assert len(guest.ends) == 2


@pytest.mark.parametrize("answer", [_LAST, _JSON + b"x", _JSON + _JSON, _CHUNKED + b"HTTP"])
async def test_an_answer_that_is_the_last_or_too_long(answer: bytes, guest: Guest) -> None:
    assert await guest.call(answer) == b"{}"
    assert await guest.call(HEALTHY) == b""
    assert len(guest.ends) == 2


@_COMES
async def test_what_comes_unnoticed_while_nothing_is_asked(come: Come, guest: Guest) -> None:
    """The loop has had no turn to hear of it."""
    await guest.call()
    come(guest.ends[0])
    assert await guest.call(_JSON) == b"{}"
    assert (len(guest.ends), len(guest.requests)) == (2, 2)


@_COMES
async def test_what_comes_while_nothing_is_asked(come: Come, guest: Guest) -> None:
    await guest.call()
    [connection] = guest.client._idle
    connection._wake.clear()
    come(guest.ends[0])
    await connection._wake.wait()
    assert connection._failure is not None
    assert await guest.call(_JSON) == b"{}"
    assert (len(guest.ends), len(guest.requests)) == (2, 2)


async def test_a_request_that_the_guest_may_have_seen_is_not_sent_again(guest: Guest) -> None:
    await guest.call()
    calling = asyncio.create_task(guest.client.call("POST", "/x", b"{}"))
    (await guest.asked()).close()
    with pytest.raises(GuestGone):
        await calling
    assert (len(guest.ends), len(guest.requests)) == (1, 2)


async def test_no_more_are_kept_than_a_few(guest: Guest) -> None:
    calling = [asyncio.create_task(guest.client.call("GET", "/x")) for _ in range(9)]
    asked = [await guest.asked() for _ in calling]
    for end in asked:
        end.sendall(HEALTHY)
    await asyncio.gather(*calling)
    assert len(guest.client._idle) == 4


async def test_a_life_takes_its_connections_along(guest: Guest) -> None:
    await guest.call()
    guest.client.close()
    await asyncio.sleep(0)
    assert guest.ends[0].recv(1) == b""
    with pytest.raises(GuestGone):
        await guest.client.health()
    assert len(guest.requests) == 1


async def test_a_connection_that_comes_to_be_after_its_life_is_not_used() -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    may_connect = asyncio.Event()

    async def connect() -> socket.socket:
        await may_connect.wait()
        return here

    client = GuestClient(connect, None)
    calling = asyncio.create_task(client.health())
    await asyncio.sleep(0)
    client.close()
    may_connect.set()
    with there, pytest.raises(GuestGone):
        await calling
    await asyncio.sleep(0)
    assert here.fileno() == -1


def test_connections_are_used_again_on_uvloop() -> None:
    """It holds sockets in a way of its own."""

    async def play(come: Come) -> None:
        async with a_guest() as guest:
            await guest.call(_JSON)
            await guest.call(_JSON)
            assert len(guest.ends) == 1
            come(guest.ends[0])
            await guest.call(_JSON)
            assert (len(guest.ends), len(guest.requests)) == (2, 3)

    for come in (socket.socket.close, say(b"x"), say(_JSON)):
        uvloop.run(play(come))
