"""Connections to guests that are kept between the requests of one client."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from support.api_server import make_settings
from support.ports import Edge, Play, program

pytestmark = pytest.mark.asyncio(loop_scope="module")

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def _answering(answer: bytes) -> Play:
    """The same to each request, on connections that stay."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)

    return play


def _watching(ended: asyncio.Event) -> Play:
    """Answers one request, and sets `ended` at the end of its connection."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_OK)
        with suppress(OSError):
            await reader.read()
        ended.set()

    return play


async def test_requests_of_one_client_share_a_connection_to_the_guest(
    edge: Edge, sandbox: str
) -> None:
    async with program(_answering(_OK)) as guest, edge.client() as one, edge.client() as other:
        host = {"Host": edge.host(sandbox, guest.port)}
        for _ in range(5):
            assert (await one.get("/", headers=host)).text == "hello"
        assert guest.connections == 1
        assert (await other.get("/", headers=host)).text == "hello"
        assert guest.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        _OK + b"x",
        _OK + _OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + _OK,
    ],
)
async def test_a_connection_is_not_used_again_behind_any_other_answer(
    edge: Edge, sandbox: str, answer: bytes
) -> None:
    async with program(_answering(answer)) as guest, edge.client() as client:
        host = {"Host": edge.host(sandbox, guest.port)}
        for count in (1, 2, 3):
            assert (await client.get("/", headers=host)).text == "hello"
            assert guest.connections == count


@pytest.mark.parametrize("method", ["POST", "HEAD", "DELETE"])
async def test_any_request_but_a_get_has_a_connection_of_its_own(
    edge: Edge, sandbox: str, method: str
) -> None:
    async with program(_answering(_OK)) as guest, edge.client() as client:
        host = {"Host": edge.host(sandbox, guest.port)}
        await client.get("/", headers=host)
        for count in (2, 3):
            assert (await client.request(method, "/", headers=host)).status_code == 200
            assert guest.connections == count


async def test_a_get_with_a_body_has_a_connection_of_its_own(edge: Edge, sandbox: str) -> None:
    async with program(_answering(_OK)) as guest, edge.client() as client:
        host = {"Host": edge.host(sandbox, guest.port)}
        for count in (1, 2):
            hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
            answer = await client.request("GET", "/", headers=host, content=hidden)
            assert (answer.text, guest.connections) == ("hello", count)


async def test_what_comes_between_two_answers_ends_the_connection(edge: Edge, sandbox: str) -> None:
    said = asyncio.Event()

    async def talking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_OK)
        await asyncio.sleep(0.05)
        writer.write(_OK.replace(b"hello", b"wrong"))
        with suppress(OSError):
            await reader.read()
        said.set()

    async with program(talking) as guest, edge.client() as client:
        host = {"Host": edge.host(sandbox, guest.port)}
        for _ in range(2):
            said.clear()
            assert (await client.get("/", headers=host)).text == "hello"
            await said.wait()
        assert guest.connections == 2


async def test_a_request_is_asked_again_where_the_program_had_closed_its_connection(
    edge: Edge, sandbox: str
) -> None:
    async def curt(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_OK)
        await reader.readuntil(b"\r\n\r\n")  # and closes without an answer

    async with program(curt) as guest, edge.client() as client:
        host = {"Host": edge.host(sandbox, guest.port)}
        for _ in range(3):
            assert (await client.get("/", headers=host)).text == "hello"
        assert guest.connections == 3


async def test_a_new_connection_that_ends_without_an_answer_is_not_tried_again(
    edge: Edge, sandbox: str
) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with program(silent) as guest:
        assert (await edge.get(sandbox, guest.port)).status_code == 502
        assert guest.connections == 1


async def test_a_connection_ends_with_that_of_its_client(edge: Edge, sandbox: str) -> None:
    ended = asyncio.Event()
    async with program(_watching(ended)) as guest:
        async with edge.client() as client:
            await client.get("/", headers={"Host": edge.host(sandbox, guest.port)})
            assert not ended.is_set()
        await ended.wait()


@pytest.mark.slow
async def test_a_connection_rests_for_a_moment_alone(edge: Edge, sandbox: str) -> None:
    ended = asyncio.Event()
    async with program(_watching(ended)) as guest, edge.client() as client:
        await client.get("/", headers={"Host": edge.host(sandbox, guest.port)})
        await ended.wait()


@pytest.mark.slow
async def test_a_connection_ends_with_a_life_of_its_sandbox(edge: Edge) -> None:
    id = await edge.create()
    async with program(_answering(_OK)) as guest, edge.client() as client:
        host = {"Host": edge.host(id, guest.port)}
        for count in (1, 2):
            assert (await client.get("/", headers=host)).text == "hello"
            assert guest.connections == count
            await edge.act(id, "pause")
            assert (await client.get("/", headers=host)).status_code == 502
            await edge.act(id, "resume")


@pytest.mark.slow
async def test_few_connections_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wrenn_sandbox.control.service.ports.KEPT_PER_SANDBOX", 1)
    async with (
        Edge.serving(make_settings(tmp_path / "data", None)) as edge,
        program(_answering(_OK)) as guest,
        edge.client() as one,
        edge.client() as other,
    ):
        host = {"Host": edge.host(await edge.create(), guest.port)}
        for client in (one, other, other, one):
            assert (await client.get("/", headers=host)).text == "hello"
        assert guest.connections == 3
