"""The way to a port of a guest: through its agent, or without it where the agent says so."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop

from wrenn_sandbox.errors import PortNotOpen
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.guest.connection import GuestGone

_PORT = 3000


class _Guest:
    """An agent that answers requests for tunnels with `status`; a port says who has led to it."""

    def __init__(self) -> None:
        self.status = 101
        self.open = True
        self.asked: list[bool] = []
        """Whether the agent could have sent the client to the port itself."""
        self.client = GuestClient(self._to_agent, "token", self._to_port)
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self) -> bytes:
        """What says who has led to the port."""

        async def nothing() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        async with self.client.tunnel(_PORT, nothing()) as pieces:
            return b"".join([piece async for piece in pieces])

    async def _to_agent(self) -> socket.socket:
        here, there = socket.socketpair()
        self._tasks.add(asyncio.create_task(self._agent(there)))
        here.setblocking(False)
        return here

    async def _to_port(self, port: int) -> socket.socket:
        assert port == _PORT
        if not self.open:
            raise ConnectionRefusedError
        here, there = socket.socketpair()
        with there:
            there.sendall(b"nobody")
        here.setblocking(False)
        return here

    async def _agent(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        head = await reader.readuntil(b"\r\n\r\n")
        may_send_away = b"Direct: yes\r\n" in head
        self.asked.append(may_send_away)
        status = 101 if self.status == 204 and not may_send_away else self.status
        writer.write(b"HTTP/1.1 %d X\r\n\r\n%b" % (status, b"agent" if status == 101 else b""))
        writer.close()


@asynccontextmanager
async def _guest() -> AsyncIterator[_Guest]:
    guest = _Guest()
    try:
        yield guest
    finally:
        guest.client.close()
        await asyncio.gather(*guest._tasks)


async def test_the_agent_leads_to_a_port_until_it_says_that_it_need_not() -> None:
    async with _guest() as guest:
        assert await guest.ask() == b"agent"
        guest.status = 204
        assert await guest.ask() == b"nobody"
        assert await guest.ask() == b"nobody"
        assert guest.asked == [True, True]


async def test_a_port_that_cannot_be_reached_is_left_to_the_agent() -> None:
    """As behind a packet filter of the guest's own."""
    async with _guest() as guest:
        guest.status, guest.open = 204, False
        assert await guest.ask() == b"agent"
        assert await guest.ask() == b"agent"
        assert guest.asked == [True, False, False]


async def test_a_program_that_now_listens_on_loopback_only_is_asked_for_again() -> None:
    async with _guest() as guest:
        guest.status = 204
        assert await guest.ask() == b"nobody"
        guest.status, guest.open = 101, False
        assert await guest.ask() == b"agent"
        guest.status, guest.open = 204, True
        assert await guest.ask() == b"nobody"
        guest.status, guest.open = 412, False
        with pytest.raises(PortNotOpen):
            await guest.ask()


async def test_without_another_way_the_agent_is_not_offered_one() -> None:
    async with _guest() as guest:
        guest.status = 204
        guest.client = GuestClient(guest._to_agent, "token")
        assert await guest.ask() == b"agent"
        assert guest.asked == [False]


async def test_an_answer_before_the_end_of_an_upload_is_read_whole() -> None:
    """A program that closes with something unread resets its connection."""
    answer = b"HTTP/1.1 413 Too much\r\n\r\n" + bytes(4000)

    def refuse(listener: socket.socket) -> None:
        with listener.accept()[0] as peer:
            peer.recv(4096)
            peer.sendall(answer)

    async def upload() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(64 * 1024)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def connect(_: int) -> socket.socket:
            sock = socket.create_connection(listener.getsockname())
            sock.setblocking(False)
            return sock

        client = GuestClient(_nowhere, "token", connect)
        client._direct_ports.add(_PORT)
        for _ in range(20):
            refusing = asyncio.create_task(asyncio.to_thread(refuse, listener))
            async with client.tunnel(_PORT, upload()) as pieces:
                read = b""
                while len(read) < len(answer):
                    read += await anext(pieces)
            assert read == answer
            await refusing


@pytest.mark.parametrize("loop", [asyncio.run, uvloop.run])
def test_the_end_of_a_life_ends_direct_connections(loop: Callable[..., None]) -> None:
    async def play() -> None:
        async with _guest() as guest:
            here, there = socket.socketpair()
            here.setblocking(False)

            async def connect(_: int) -> socket.socket:
                return here

            async def nothing() -> AsyncIterator[bytes]:
                await asyncio.Event().wait()
                yield b""

            guest.client._connect_port = connect
            guest.client._direct_ports.add(_PORT)
            with there:
                async with guest.client.tunnel(_PORT, nothing()) as pieces:
                    reading = asyncio.ensure_future(anext(pieces))
                    await asyncio.sleep(0.05)
                    guest.client.close()
                    assert here.fileno() >= 0, "it was closed while it was being read"
                    with pytest.raises(GuestGone):
                        await reading
                assert here.fileno() < 0
                assert there.recv(1) == b""

    loop(play())


async def _nowhere() -> socket.socket:
    raise ConnectionRefusedError
