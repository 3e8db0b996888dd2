"""Whether a guest is there: any word of it says so, and only silence that it is not."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from support.scripted_guest import Guest, a_guest
from wrenn_sandbox.host.guest import GuestClient, GuestGone, GuestUnreachable


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with a_guest() as guest:
        await guest.call()
        yield guest


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n",
        b"rubbish\r\n\r\n",
        b"",
    ],
)
async def test_whatever_a_guest_says_is_an_answer(guest: Guest, said: bytes) -> None:
    asking = asyncio.create_task(guest.client.answer())
    end = await guest.asked()
    assert guest.requests[-1].startswith(b"GET /health ")
    assert end is guest.ends[-1], "not a connection that was kept"
    end.sendall(said)
    end.shutdown(socket.SHUT_WR)
    await asking
    assert not guest.client._busy


async def test_a_silent_guest_is_waited_for(guest: Guest) -> None:
    asking = asyncio.create_task(guest.client.answer())
    await guest.asked()
    done, _ = await asyncio.wait({asking}, timeout=0.3)
    assert not done
    asking.cancel()
    await asyncio.wait({asking})
    assert not guest.client._busy
    assert await guest.call() == b"", "what was kept is of use still"


async def test_an_unreachable_guest_is_told_from_a_silent_one() -> None:
    async def refuse() -> socket.socket:
        raise ConnectionRefusedError

    with pytest.raises(GuestUnreachable):
        await GuestClient(refuse, None).answer()


async def test_a_guest_whose_life_is_over_is_not_waited_for(guest: Guest) -> None:
    asking = asyncio.create_task(guest.client.answer())
    await guest.asked()
    guest.client.close()
    await asking
    with pytest.raises(GuestGone):
        await guest.client.answer()
