"""HTTP through the proxy: what it passes on, and how it ends, with both sides played."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from wrenn_sandbox.host.egress import http
from wrenn_sandbox.host.egress.connection import Connection
from wrenn_sandbox.patience import patience

HEAD = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


@dataclass
class Played:
    """The guest's end, and the far ends in the order in which they were called."""

    guest: socket.socket
    far: "asyncio.Queue[socket.socket]" = field(default_factory=asyncio.Queue)

    async def send(self, sock: socket.socket, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, data)

    async def receive(self, sock: socket.socket, last: bytes = b"") -> bytes:
        """What comes up to these bytes, or to the end without any."""
        loop, data = asyncio.get_running_loop(), b""
        async with asyncio.timeout(patience(5)):
            while not last or not data.endswith(last):
                with suppress(ConnectionResetError):
                    if more := await loop.sock_recv(sock, 65_536):
                        data += more
                        continue
                assert not last, data
                break
        return data

    async def asked(self, last: bytes = b"\r\n\r\n") -> tuple[socket.socket, bytes]:
        """The next far side that is called, and what it is sent."""
        async with asyncio.timeout(patience(5)):
            far = await self.far.get()
        return far, await self.receive(far, last)


@pytest.fixture
async def played() -> AsyncIterator[Played]:
    async with _played() as found:
        yield found


@asynccontextmanager
async def _played() -> AsyncIterator[Played]:
    near, guest = socket.socketpair()
    found, opened = Played(guest), [guest]

    async def dial(connection: Connection, name: str, port: int) -> socket.socket:
        connection.name = name
        ours, theirs = socket.socketpair()
        for each in (ours, theirs):
            each.setblocking(False)
        opened.append(theirs)
        found.far.put_nowait(theirs)
        return ours

    for each in (near, guest):
        each.setblocking(False)
    task = asyncio.create_task(Connection(near, dial).serve(http.serve))
    try:
        yield found
    finally:
        for each in opened:
            each.close()
        async with asyncio.timeout(patience(5)):
            await asyncio.gather(task, return_exceptions=True)


async def test_bodies_of_any_framing_are_passed_on(played: Played) -> None:
    await played.send(
        played.guest,
        b"POST /x HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;x=y\r\nabc\r\n0\r\n\r\n",
    )
    far, asked = await played.asked(b"0\r\n\r\n")
    assert asked.startswith(b"POST /x HTTP/1.1\r\nHost: a.example\r\n")
    assert asked.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    await played.send(far, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    await played.send(far, b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
    answer = await played.receive(played.guest, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert answer.endswith(b"\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
    await played.send(played.guest, HEAD.replace(b"GET", b"HEAD"))
    await played.receive(far, b"\r\n\r\n")
    await played.send(far, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
    assert (await played.receive(played.guest, b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    await played.send(played.guest, HEAD)
    await played.receive(far, b"\r\n\r\n")
    await played.send(far, b"HTTP/1.0 200 OK\r\n\r\nto the end")
    far.close()
    assert b"to the end" in await played.receive(played.guest)


async def test_another_host_is_another_connection(played: Played) -> None:
    """Requests that come before their turn wait."""
    await played.send(played.guest, HEAD + HEAD.replace(b"a.ex", b"b.ex"))
    first, asked = await played.asked()
    assert asked == HEAD
    await played.send(first, b"HTTP/1.1 204 No Content\r\n\r\n")
    _, asked = await played.asked()
    assert asked == HEAD.replace(b"a.ex", b"b.ex")
    assert await played.receive(first) == b""


async def test_an_answer_may_come_before_the_request_is_complete(played: Played) -> None:
    await played.send(
        played.guest, b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 9\r\n\r\nabc"
    )
    far, _ = await played.asked(b"abc")
    await played.send(far, b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    assert (await played.receive(played.guest)).endswith(b"\r\n\r\nno")


async def test_what_is_no_http_is_not_passed_on(played: Played) -> None:
    await played.send(played.guest, HEAD)
    far, _ = await played.asked()
    await played.send(far, b"220 mail.example ESMTP\r\n\r\n")
    assert (await played.receive(played.guest)).startswith(b"HTTP/1.1 502 ")
    assert await played.receive(far) == b""


async def test_a_server_that_hangs_up_is_told_of(played: Played) -> None:
    await played.send(played.guest, HEAD)
    far, _ = await played.asked()
    far.close()
    assert (await played.receive(played.guest)).startswith(b"HTTP/1.1 502 ")


@pytest.mark.parametrize("answered", [True, False])
async def test_each_side_sees_that_the_other_one_has_ended(played: Played, answered: bool) -> None:
    await played.send(played.guest, HEAD)
    far, _ = await played.asked()
    if answered:
        await played.send(far, b"HTTP/1.1 204 No Content\r\n\r\n")
        await played.receive(played.guest, b"\r\n\r\n")
        far.close()
        assert await played.receive(played.guest) == b""
    else:
        played.guest.close()
        assert await played.receive(far) == b""


async def test_a_server_that_hands_out_another_protocol_unasked(played: Played) -> None:
    await played.send(played.guest, HEAD)
    far, _ = await played.asked()
    await played.send(far, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nraw")
    assert b"raw" not in await played.receive(played.guest)


async def test_what_is_ready_at_once_gives_way_to_others() -> None:
    near, other = socket.socketpair()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def work(connection: Connection) -> None:
        for _ in range(100):
            await connection.send(near, b"x")
            other.send(b"y")
            await connection.receive(near)

    async def dial(connection: Connection, name: str, port: int) -> socket.socket:
        raise AssertionError

    near.setblocking(False)
    counting = asyncio.create_task(count())
    await Connection(near, dial).serve(work)
    counting.cancel()
    other.close()
    assert turns > 150


async def test_a_head_of_very_many_headers_is_refused(played: Played) -> None:
    await played.send(played.guest, HEAD[:-2] + b"a:\r\n" * 200 + b"\r\n")
    assert (await played.receive(played.guest)).startswith(b"HTTP/1.1 400 ")
    assert played.far.empty()
