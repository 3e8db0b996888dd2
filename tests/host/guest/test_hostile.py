"""The client of the guest's agent against guests that lie, drag and flood."""

import asyncio
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from support.played_agent import chunk, exec_in, floods, frame, guest, says
from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.host.guest import GuestClient, GuestUnreachable
from wrenn_sandbox.host.guest import client as client_module
from wrenn_sandbox.host.guest.processes import GuestProcesses
from wrenn_sandbox.wire.messages import Command

_MB = 1 << 20
_COMMAND = Command(cmd="true")
_MEMORY = 48 * _MB
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n"
_CHUNKED = _STREAM + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Most bytes that were allocated at once during the test."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


_FILLER = b"x" * 65536
_FLOODS = {
    "header lines": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 1000),
    "one header": (b"HTTP/1.1 200 OK\r\nA: ", _FILLER),
    "status line": (b"HTTP/1.1 200 ", _FILLER),
    "trailer": (_CHUNKED + chunk(frame({})) + b"0\r\nA: ", _FILLER),
    "trailer lines": (_CHUNKED + chunk(frame({})) + b"0\r\n", b"A: b\r\n" * 1000),
    "chunk extension": (_CHUNKED + b"5;", _FILLER),
    "garbage": (b"", b"\0\xff\r\n" * 1000),
    "envelope too long": (_CHUNKED + chunk(struct.pack(">BI", 0, 2**32 - 1)), chunk(_FILLER)),
    "after the end": (_CHUNKED + chunk(frame({}, 2)), chunk(_FILLER)),
    "unary error without end": (
        b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n",
        chunk(_FILLER),
    ),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
}


@pytest.mark.parametrize("name", _FLOODS)
async def test_floods_end_with_an_error(name: str, peak: Callable[[], int]) -> None:
    first, endless = _FLOODS[name]
    async with guest(floods(first, endless)) as client:
        with pytest.raises(AgentError) as caught:
            await exec_in(client)
    assert peak() < _MEMORY
    assert "127.0.0.1" not in str(caught.value)


async def test_endless_output_is_cut(peak: Callable[[], int]) -> None:
    data = frame({"event": {"data": {"stdout": "QUJD" * 20_000}}})
    start = chunk(frame({"event": {"start": {"pid": 7}}}))
    async with guest(floods(_CHUNKED + start, chunk(data))) as client:
        async with asyncio.timeout(20):
            result = await GuestProcesses(client).exec(_COMMAND, timeout=1.0, output_limit=_MB)
    assert result.timed_out
    assert result.truncated
    assert len(result.stdout) == _MB
    assert peak() < _MEMORY


_LIES = {
    "nothing": b"",
    "half a status line": b"HTTP/1.1 20",
    "no body": _STREAM + b"Content-Length: 100\r\n\r\n",
    "less than announced": _STREAM + b"Content-Length: 100\r\n\r\n" + frame({}),
    "more than announced": _STREAM + b"Content-Length: 3\r\n\r\n" + frame({}, 2),
    "negative length": _STREAM + b"Content-Length: -1\r\n\r\n",
    "two lengths": _STREAM + b"Content-Length: 7\r\nContent-Length: 8\r\n\r\n" + frame({}, 2),
    "bad chunk": _CHUNKED + b"zz\r\n",
    "no end": _CHUNKED + chunk(frame({})) + b"0\r\n\r\n",
    "half an envelope": _CHUNKED + chunk(frame({})[:4]) + b"0\r\n\r\n",
    "unknown flags": _CHUNKED + chunk(frame({}, 1)) + b"0\r\n\r\n",
    "not JSON": _CHUNKED + chunk(frame(b"{")) + b"0\r\n\r\n",
    "another JSON": _CHUNKED + chunk(frame([1])) + b"0\r\n\r\n",
    "wrong types": _CHUNKED + chunk(frame({"event": {"start": {"pid": "x"}}})) + b"0\r\n\r\n",
    "not base64": _CHUNKED + chunk(frame({"event": {"data": {"stdout": "!"}}})) + b"0\r\n\r\n",
    "nested deeply": _CHUNKED + chunk(frame(b'{"x":' + b"[" * 100_000)) + b"0\r\n\r\n",
    "nested deeply at the end": _CHUNKED + chunk(frame(b'{"x":' + b"[" * 100_000, 2)),
    "no UTF-8": _CHUNKED + chunk(frame(b'{"event":{"end":{"status":"\xff"}}}')) + b"0\r\n\r\n",
    "end without end event": _CHUNKED + chunk(frame({}, 2)) + b"0\r\n\r\n",
    "error object": _CHUNKED + chunk(frame({"error": {"code": "x" * 10_000}}, 2)) + b"0\r\n\r\n",
    "error of another type": _CHUNKED + chunk(frame({"error": 5}, 2)) + b"0\r\n\r\n",
    "unary error": b"HTTP/1.1 418 Tea\r\nContent-Length: 1\r\n\r\n{",
    "unary error, nested deeply": b"HTTP/1.1 418 Tea\r\nContent-Length: 100005\r\n\r\n"
    + b'{"x":'
    + b"[" * 100_000,
    "another protocol": b"SSH-2.0-OpenSSH\r\n",
    "upgrade": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
}


@pytest.mark.parametrize("name", _LIES)
async def test_lies_end_with_an_error(name: str) -> None:
    async with guest(says(_LIES[name])) as client:
        with pytest.raises(AgentError) as caught:
            await exec_in(client)
    assert len(str(caught.value)) < 4096


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\n", _CHUNKED, _CHUNKED + b"5\r\n"])
async def test_a_guest_that_falls_silent_is_given_up(first: bytes) -> None:
    """The command's time limit holds whatever the guest has said by then."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        await reader.read()

    async with guest(play) as client, asyncio.timeout(10):
        with pytest.raises(AgentError, match="does not respond"):
            await GuestProcesses(client).exec(_COMMAND, timeout=0.2, output_limit=_MB)


@pytest.mark.parametrize("kills", [True, False])
async def test_a_command_that_starts_too_late_is_killed(
    kills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that begins when its time is over is killed, and the answer says whether."""
    asked: list[bytes] = []
    monkeypatch.setattr(client_module, "GRACE_SEC", 1.0)

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(b"")
        if len(asked) == 1:
            await asyncio.sleep(0.4)
            writer.write(_CHUNKED + chunk(frame({"event": {"start": {"pid": 7}}})))
            await reader.read()
        elif kills:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        else:
            await reader.read()

    async with guest(play) as client, asyncio.timeout(10):
        result = await GuestProcesses(client).exec(_COMMAND, timeout=0.1, output_limit=_MB)
    assert len(asked) == 2
    assert (result.timed_out, result.killed) == (True, kills)


async def test_a_guest_that_sends_byte_by_byte() -> None:
    answer = _CHUNKED + chunk(frame({"event": {"start": {"pid": 1}}}))
    answer += chunk(frame({"event": {"end": {"exitCode": 3}}})) + chunk(frame({}, 2)) + b"0\r\n\r\n"

    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for position in range(len(answer)):
            writer.write(answer[position : position + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async with guest(play) as client, asyncio.timeout(10):
        result = await GuestProcesses(client).exec(_COMMAND, timeout=5, output_limit=_MB)
    assert result.exit_code == 3


async def test_an_answer_before_the_question_is_not_taken_for_one() -> None:
    """What comes after an answer is not the answer of the next call."""
    health = b"HTTP/1.1 204 No Content\r\n\r\n"
    calls = 0

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(health + health)
        await reader.read()

    async with guest(play) as client, asyncio.timeout(10):
        for _ in range(2):
            with suppress(AgentError):
                await client.health()
    assert calls == 2


async def test_a_call_to_a_guest_without_listener_fails() -> None:
    async def connect() -> socket.socket:
        raise ConnectionRefusedError(111, "refused 127.0.0.1:1")

    with pytest.raises(GuestUnreachable) as caught:
        await GuestClient(connect, None).health()
    assert "127.0.0.1" not in str(caught.value)


async def test_a_closed_client_ends_what_is_under_way() -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_CHUNKED)
        await reader.read()

    async with guest(play) as client, asyncio.timeout(10):
        running = asyncio.create_task(
            GuestProcesses(client).exec(_COMMAND, timeout=60, output_limit=_MB)
        )
        await asyncio.sleep(0.05)
        client.close()
        with pytest.raises(AgentError):
            await running
        with pytest.raises(AgentError):
            await client.health()
