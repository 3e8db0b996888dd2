"""Calls to Firecracker's API, and answers of one that its guest has taken over."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.vmm.firecracker import api as module
from wrenn_sandbox.host.vmm.firecracker.api import BODY_LIMIT, Api, Declined

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def answering(path: Path, answer: bytes, *, close: bool = True) -> AsyncIterator[list[bytes]]:
    """A server on the socket that takes requests and says the same to each of them."""
    requests: list[bytes] = []
    served: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, EOFError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or b"0"
            requests.append(head + await reader.readexactly(int(length)))
            writer.write(answer)
            await writer.drain()
            while not close and await reader.read(1):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.ensure_future(serve(reader, writer)))

    async with await asyncio.start_unix_server(accept, path):
        yield requests
    await asyncio.gather(*served)


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path / "socket", os.getpid())


async def test_a_call_is_one_request(tmp_path: Path, api: Api) -> None:
    async with answering(tmp_path / "socket", b"HTTP/1.1 204 \r\nServer: x\r\n\r\n") as requests:
        assert await api.call("PUT", "/actions", {"action_type": "InstanceStart"}) == b""
    [request] = requests
    assert request.startswith(b"PUT /actions HTTP/1.1\r\n")
    assert request.endswith(b'\r\n\r\n{"action_type":"InstanceStart"}')


async def test_version_and_state_are_read(tmp_path: Path, api: Api) -> None:
    body = b'{"firecracker_version":"1.14.4","state":"Paused"}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with answering(tmp_path / "socket", answer, close=False):
        assert await api.version() == "1.14.4"
        assert await api.state() == "Paused"


async def test_a_refusal_has_its_reason(tmp_path: Path, api: Api) -> None:
    body = b'{"fault_message":"Invalid vcpu count"}'
    answer = b"HTTP/1.1 400 Bad\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    async with answering(tmp_path / "socket", answer):
        with pytest.raises(Declined) as caught:
            await api.call("PUT", "/machine-config", {})
    assert "Invalid vcpu count" in (caught.value.detail or "")
    assert "vcpu" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\n\r",
        b"HTTP/2 200 OK\r\n\r\n",
        b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (BODY_LIMIT + 1) + bytes(BODY_LIMIT + 1),
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{\xff\xff}",
        b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"state":12}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"[" * 5000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    ],
)
async def test_answers_that_are_no_answers_fail(tmp_path: Path, api: Api, answer: bytes) -> None:
    async with answering(tmp_path / "socket", answer):
        with pytest.raises(HostFailure) as caught:
            await api.state()
    assert len(caught.value.detail or "") < 1000


async def test_a_vmm_that_says_nothing_is_not_waited_for(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "patience", lambda _: 0.05)
    async with answering(tmp_path / "socket", b"HTTP/1.1 ", close=False):
        with pytest.raises(HostFailure, match="refused the command or has exited") as caught:
            await api.call("GET", "/version")
    assert "no answer within 0.05 s" in (caught.value.detail or "")


async def test_a_socket_of_another_process_is_not_believed(tmp_path: Path) -> None:
    api = Api(tmp_path / "socket", os.getppid())
    async with answering(tmp_path / "socket", b"HTTP/1.1 204 \r\n\r\n") as requests:
        with pytest.raises(HostFailure) as caught:
            await api.call("GET", "/version")
    assert "instead of" in (caught.value.detail or "")
    assert requests == []


@pytest.mark.parametrize(
    ("state", "targets"),
    [("Running", ["/"]), ("Paused", ["/", "/vm"])],
)
async def test_only_a_vm_that_stands_still_is_resumed(
    tmp_path: Path, api: Api, state: str, targets: list[str]
) -> None:
    body = b'{"state":"%s"}' % state.encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with answering(tmp_path / "socket", answer) as requests:
        await api.resume()
    assert [each.split()[1].decode() for each in requests] == targets


async def test_a_socket_that_is_bound_only_does_not_listen_yet(tmp_path: Path, api: Api) -> None:
    assert not await api.listens()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert not await api.listens()
        listener.listen()
        assert await api.listens()
