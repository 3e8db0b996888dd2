"""A guest that nothing reaches any more, though it has not ended its connections."""

import asyncio
import ctypes
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from support.scripted_guest import Guest, a_guest
from wrenn_sandbox.host.guest import GuestClient, client, connection, files, processes
from wrenn_sandbox.host.guest.connection import GuestGone
from wrenn_sandbox.host.guest.files import GuestFiles
from wrenn_sandbox.host.guest.processes import GuestProcesses
from wrenn_sandbox.wire.messages import Command, ProcessRef, ProcessSignal, TerminalSize

_ATTACH_FILTER = 26  # asm-generic/socket.h
_SEC = 0.3
_CREATED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def fall_silent(end: socket.socket) -> None:
    """Drop whatever comes in for a socket, unseen and unacknowledged."""
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # return 0 bytes
    program = struct.pack("HxxxxxxP", 1, ctypes.addressof(nothing))
    end.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TAKEN_SEC", _SEC, raising=False)


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with a_guest() as guest:
        await guest.call()
        yield guest


async def read_all(end: socket.socket, size: int) -> None:
    while size > 0:
        size -= len(await asyncio.get_running_loop().sock_recv(end, 1 << 20))


async def one_piece(data: bytes, after: asyncio.Event) -> AsyncIterator[bytes]:
    await after.wait()
    yield data


@pytest.mark.root
async def test_a_kept_connection_into_silence_is_given_up_as_soon_as_a_new_one(
    guest: Guest,
) -> None:
    fall_silent(guest.ends[0])
    async with asyncio.timeout(20 * _SEC):
        with pytest.raises(GuestGone, match="does not respond"):
            await guest.client.call("GET", "/x")
    assert await guest.call() == b""
    assert len(guest.ends) == 2


@pytest.mark.root
async def test_an_upload_into_silence_is_given_up(guest: Guest) -> None:
    fall_silent(guest.ends[0])
    async with asyncio.timeout(20 * _SEC):
        with pytest.raises(GuestGone, match="does not respond"):
            await GuestFiles(guest.client).write_file("/x", one_piece(b"x", asyncio.Event()))


@pytest.mark.parametrize("size", [1, 32 << 20])
async def test_a_guest_that_takes_its_time_is_waited_for(guest: Guest, size: int) -> None:
    """It has the request, but reads none of it; a big one fills its window."""
    calling = asyncio.create_task(guest.client.call("POST", "/x", bytes(size)))
    await asyncio.wait([calling], timeout=3 * _SEC)
    assert not calling.done()
    [end] = guest.ends
    await read_all(end, size)
    await asyncio.get_running_loop().sock_sendall(end, _CREATED)
    assert await calling == (200, b"{}")


async def test_a_slow_upload_is_waited_for(guest: Guest) -> None:
    more = asyncio.Event()
    writing = asyncio.create_task(GuestFiles(guest.client).write_file("/x", one_piece(b"x", more)))
    await asyncio.wait([writing], timeout=3 * _SEC)
    assert not writing.done()
    more.set()
    (await guest.asked()).sendall(_CREATED)
    await writing


_COMMAND = Command(cmd="true")


async def _read(client: GuestClient) -> None:
    async with GuestFiles(client).read_file("/x"):
        pass


async def _write(client: GuestClient) -> None:
    more = asyncio.Event()
    more.set()
    await GuestFiles(client).write_file("/x", one_piece(b"x", more))


async def _write_much(client: GuestClient) -> None:
    more = asyncio.Event()
    more.set()
    await GuestFiles(client).write_file("/x", one_piece(bytes(32 << 20), more))


async def _start(client: GuestClient) -> None:
    async with GuestProcesses(client).start_process(_COMMAND, stdin=True):
        pass


async def _attach(client: GuestClient) -> None:
    async with GuestProcesses(client).attach_process(ProcessRef(pid=1), replay=False):
        pass


async def _detached(client: GuestClient) -> None:
    await GuestProcesses(client).start_detached(_COMMAND, tag="x")


_CALLS: dict[str, Callable[[GuestClient], Awaitable[object]]] = {
    "metrics": lambda client: client.metrics(),
    "health": lambda client: client.health(),
    "exec": lambda client: GuestProcesses(client).exec(_COMMAND, timeout=3600, output_limit=1),
    "read": _read,
    "write": _write,
    "write much": _write_much,
    "list": lambda client: GuestFiles(client).list_directory("/", 1),
    "mkdir": lambda client: GuestFiles(client).make_directory("/x"),
    "remove": lambda client: GuestFiles(client).remove_path("/x"),
    "start": _start,
    "attach": _attach,
    "start detached": _detached,
    "processes": lambda client: GuestProcesses(client).processes(),
    "input": lambda client: GuestProcesses(client).send_input(1, b"x", terminal=False),
    "close input": lambda client: GuestProcesses(client).close_input(1),
    "resize": lambda client: GuestProcesses(client).resize_terminal(
        1, TerminalSize(cols=80, rows=24)
    ),
    "signal": lambda client: GuestProcesses(client).signal_process(
        ProcessRef(pid=1), ProcessSignal.KILL
    ),
}


@pytest.mark.parametrize("call", _CALLS)
async def test_a_guest_that_takes_connections_and_answers_nothing(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (client, connection, files, processes):
        for name in ("ANSWER_SEC", "CALL_SEC", "SILENCE_SEC"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _SEC)
    async with a_guest() as guest, asyncio.timeout(30 * _SEC):
        with pytest.raises(GuestGone, match="The guest does not respond"):
            await _CALLS[call](guest.client)
