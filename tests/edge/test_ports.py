"""Ports of sandboxes by host name, by headers and by path: requests, streams, upgrades."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from support.ports import Edge, answering, program
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.asyncio(loop_scope="module")

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-From: guest\r\n\r\nhello"


async def test_a_port_is_reached_by_host_headers_and_path(edge: Edge, sandbox: str) -> None:
    heads: list[bytes] = []
    async with program(answering(_OK, heads)) as guest, edge.client() as client:
        by_host = await client.get("/a%2Fb?c=d", headers={"Host": edge.host(sandbox, guest.port)})
        named = {"E2b-Sandbox-Id": sandbox, "E2b-Sandbox-Port": str(guest.port)}
        by_headers = await client.get("/a%2Fb?c=d", headers=named)
        path = f"/v1/sandboxes/{sandbox}/ports/{guest.port}"
        key = {"X-API-Key": edge.team.key}
        by_path = await client.get(f"{path}/a%2Fb?c=d", headers=key)
        for answer in (by_host, by_headers, by_path):
            assert (answer.status_code, answer.text) == (200, "hello")
            assert answer.headers["x-from"] == "guest"
    assert {head.split(b"\r\n")[0] for head in heads} == {b"GET /a%2Fb?c=d HTTP/1.1"}
    assert f"x-forwarded-prefix: {path}".encode() in heads[2]


async def test_everything_else_goes_to_the_api(edge: Edge) -> None:
    async with edge.client() as client:
        for host in ("localhost", "api.localhost", "3000.localhost", "sandbox.example"):
            answer = await client.get("/health", headers={"Host": host})
            assert answer.json()["status"] == "ok"


@pytest.mark.parametrize(
    ("host", "port"), [("x:99", ":99"), ("x", ""), ("x:999999", ""), ("[", "")]
)
async def test_the_addresses_of_ports_have_the_port_that_was_called(
    edge: Edge, sandbox: str, host: str, port: str
) -> None:
    headers = {"Host": host, "X-API-Key": edge.team.key}
    async with edge.client() as client:
        answer = await client.get(f"/v1/sandboxes/{sandbox}/ports", headers=headers)
    assert answer.json()["url"] == f"http://{{port}}-{sandbox}.localhost{port}"


async def test_bodies_go_through_whole_in_chunks_or_with_a_length(edge: Edge, sandbox: str) -> None:
    content = bytes(range(256)) * 40_000

    async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        found = hashlib.sha256()
        if b"transfer-encoding: chunked" in head:
            while size := int(await reader.readline(), 16):
                found.update(await reader.readexactly(size))
                await reader.readexactly(2)
        else:
            found.update(await reader.readexactly(len(content)))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n")
        writer.write(found.hexdigest().encode() + b"\r\n")
        for start in range(0, len(content), 100_000):
            piece = content[start : start + 100_000]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 50_000):
            yield content[start : start + 50_000]

    async with program(digest) as guest, edge.client() as client:
        bodies: tuple[bytes | AsyncIterator[bytes], ...] = (content, pieces())
        for body in bodies:
            host = {"Host": edge.host(sandbox, guest.port)}
            answer = await client.post("/", content=body, headers=host)
            assert answer.content == hashlib.sha256(content).hexdigest().encode() + content


async def test_one_connection_of_a_client_carries_many_requests(edge: Edge, sandbox: str) -> None:
    async with program(answering(_OK)) as guest:
        host = edge.host(sandbox, guest.port).encode()
        request = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host
        last = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host
        answers = await edge.raw(request * 3 + last)
    assert answers.count(b"HTTP/1.1 200 OK") == answers.count(b"hello") == 4
    assert guest.connections == 4, "each request has its own"


async def test_events_arrive_one_by_one_while_the_answer_goes_on(edge: Edge, sandbox: str) -> None:
    taken = asyncio.Queue[None]()

    async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(3):
            writer.write(b"data: %d\n\n" % number)
            await taken.get()

    async with program(events) as guest, edge.client() as client:
        host = {"Host": edge.host(sandbox, guest.port)}
        async with client.stream("GET", "/", headers=host) as answer:
            lines = answer.aiter_lines()
            for number in range(3):
                assert await anext(lines) == f"data: {number}"
                assert await anext(lines) == ""
                taken.put_nowait(None)
            assert [each async for each in lines] == []


@pytest.mark.slow
async def test_two_hundred_websockets_stay_open_beside_each_other(edge: Edge, sandbox: str) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0) as server, AsyncExitStack() as stack:
        port = server.sockets[0].getsockname()[1]
        url = f"ws://{edge.host(sandbox, port)}/"
        peers = [
            await stack.enter_async_context(
                connect(url, host="127.0.0.1", port=edge.port, proxy=None, open_timeout=None)
            )
            for _ in range(200)
        ]
        for number in (1, 2):
            for peer in peers:
                await peer.send(str(number))
            assert {await peer.recv() for peer in peers} == {str(number)}
            assert (await edge.ports(sandbox))["domain"] == "localhost"
        assert len(server.connections) == 200


async def test_a_websocket_carries_messages_both_ways(edge: Edge, sandbox: str) -> None:
    async def echo(socket: ServerConnection) -> None:
        async for message in socket:
            await socket.send(message)

    async with serve(echo, "127.0.0.1", 0, subprotocols=["one"]) as server:  # type: ignore[list-item]
        port = server.sockets[0].getsockname()[1]
        headers = {"E2b-Sandbox-Id": sandbox, "E2b-Sandbox-Port": str(port)}
        key = {"X-API-Key": edge.team.key}
        ways: tuple[tuple[str, dict[str, str]], ...] = (
            (f"ws://{edge.host(sandbox, port)}/", {}),
            (f"ws://127.0.0.1:{edge.port}/", headers),
            (f"ws://127.0.0.1:{edge.port}/v1/sandboxes/{sandbox}/ports/{port}/", key),
            (f"ws://127.0.0.1:{edge.port}/v1/capsules/{sandbox}/ports/{port}/", key),
        )
        for url, extra in ways:
            async with connect(
                url,
                host="127.0.0.1",
                port=edge.port,
                additional_headers=extra,
                subprotocols=["one"],  # type: ignore[list-item]
                proxy=None,
            ) as socket:
                assert socket.subprotocol == "one"
                for message in ("text", b"bytes", "x" * 300_000):
                    await socket.send(message)
                    assert await socket.recv() == message


async def test_an_upgrade_of_any_protocol_has_both_directions_to_itself(
    edge: Edge, sandbox: str
) -> None:
    async def rot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"\r\nupgrade: shout\r\n" in head
        writer.write(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: shout\r\n\r\n")
        writer.write((await reader.read()).upper())
        writer.write_eof()

    async with program(rot) as guest:
        reader, writer = await edge.connect()
        host = edge.host(sandbox, guest.port).encode()
        head = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n" % host
        writer.write(head + b"early, ")
        async with asyncio.timeout(patience(20)):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            assert b"upgrade: shout" in answer
            writer.write(b"late")
            writer.write_eof()
            assert await reader.read() == b"EARLY, LATE"
        writer.close()


async def test_an_upgrade_that_the_guest_declines_is_an_ordinary_answer(
    edge: Edge, sandbox: str
) -> None:
    async with program(answering(_OK)) as guest:
        host = edge.host(sandbox, guest.port).encode()
        asked = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" % host
        last = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host
        answers = await edge.raw(asked + last)
    assert answers.count(b"HTTP/1.1 200 OK") == 2, "and the connection goes on"


async def test_head_has_no_body_and_keeps_the_length(edge: Edge, sandbox: str) -> None:
    heads: list[bytes] = []
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    async with program(answering(answer, heads)) as guest, edge.client() as client:
        key = {"X-API-Key": edge.team.key}
        path = f"/v1/sandboxes/{sandbox}/ports/{guest.port}/"
        for url, headers in (("/", {"Host": edge.host(sandbox, guest.port)}), (path, key)):
            found = await client.head(url, headers=headers)
            assert (found.status_code, found.headers["content-length"]) == (200, "5")
    assert all(head.startswith(b"HEAD / ") for head in heads)


async def test_a_slow_client_stops_the_guest_and_does_not_fill_the_server(
    edge: Edge, sandbox: str
) -> None:
    written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()
            written += 65536

    async with program(flood) as guest:
        reader, writer = await edge.connect()
        host = edge.host(sandbox, guest.port).encode()
        writer.write(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while before != written:
            before = written
            await asyncio.sleep(0.3)
        assert written < 64 << 20, "no more than what the system's buffers hold"
        writer.transport.abort()


async def test_a_guest_that_reads_slowly_stops_the_client(edge: Edge, sandbox: str) -> None:
    async def sleepy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with program(sleepy) as guest:
        _, writer = await edge.connect()
        host = edge.host(sandbox, guest.port).encode()
        size = 1 << 30
        writer.write(b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n" % (host, size))
        sent = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while sent < size:
                    writer.write(bytes(65536))
                    sent += 65536
                    await writer.drain()
        assert sent < 64 << 20
        writer.transport.abort()
