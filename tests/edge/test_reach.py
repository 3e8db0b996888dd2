"""Who reaches a port and who does not: each with an answer of its own."""

import asyncio
import base64
import hashlib
import socket
from urllib.parse import quote

import pytest

from support.api_server import eventually
from support.ports import Edge, answering, program
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.asyncio(loop_scope="module")

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
_NOBODY = "sb-22222222222222222222"


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def _rest(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(patience(20)):
        while await reader.read(4096):
            pass


async def test_a_sandbox_that_does_not_run_was_not_found(edge: Edge) -> None:
    paused, ended = await edge.create(), await edge.create()
    await edge.act(paused, "pause")
    await edge.team.client.delete(f"/v1/sandboxes/{ended}")
    for id in (_NOBODY, "sb-x", paused, ended):
        for port in (3000, 49983):
            answer = await edge.get(id, port, "/health")
            assert answer.status_code == 502
            assert "was not found" in answer.json()["message"]
            assert (answer.json()["code"], answer.json()["sandboxId"]) == (502, id)
    key = {"X-API-Key": edge.team.key}
    async with edge.client() as client:
        for id, status in ((_NOBODY, 404), (paused, 409), (ended, 409)):
            answer = await client.get(f"/v1/sandboxes/{id}/ports/3000/", headers=key)
            assert answer.status_code == status
            assert answer.json()["error"]["code"]


async def test_a_closed_port_is_not_open(edge: Edge, sandbox: str) -> None:
    port = _closed_port()
    answer = await edge.get(sandbox, port)
    assert (answer.status_code, answer.json()["port"]) == (502, port)
    assert "port is not open" in answer.json()["message"]
    key = {"X-API-Key": edge.team.key}
    async with edge.client() as client:
        answer = await client.get(f"/v1/sandboxes/{sandbox}/ports/{port}/", headers=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "agent_error")
    assert (await edge.get(sandbox, 49983, "/health")).status_code == 204, "it is there still"


async def test_the_path_of_a_port_needs_a_key_of_its_team(edge: Edge, sandbox: str) -> None:
    other = await edge.server.team()
    heads: list[bytes] = []
    async with program(answering(_OK, heads)) as guest, edge.client() as client:
        path = f"/v1/sandboxes/{sandbox}/ports/{guest.port}/"
        for headers, status in (
            ({}, 401),
            ({"X-API-Key": "wrn_" + 32 * "0"}, 401),
            ({"X-API-Key": other.key}, 404),
            (other.bearer, 404),
            (edge.team.bearer, 200),
        ):
            assert (await client.get(path, headers=headers)).status_code == status
    assert len(heads) == 1
    assert b"authorization" not in heads[0]


async def test_a_path_of_a_port_with_encoded_slashes_is_not_there(edge: Edge, sandbox: str) -> None:
    key = {"X-API-Key": edge.team.key}
    async with edge.client() as client:
        for path in (
            f"/v1%2Fsandboxes%2F{sandbox}%2Fports%2F3000%2F",
            f"/v1/sandboxes%2F{sandbox}/ports/3000/a/b",
        ):
            answer = await client.get(path, headers=key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_private_ports_need_their_token_which_no_guest_sees(edge: Edge) -> None:
    id = await edge.create(private_ports=True)
    token = (await edge.ports(id))["token"]
    foreign = (await edge.ports(await edge.create()))["token"]
    heads: list[bytes] = []
    async with program(answering(_OK, heads)) as guest:
        for wrong in ({}, {"e2b_traffic_access_token": foreign}):
            answer = await edge.get(id, guest.port, **wrong)
            assert (answer.status_code, answer.json()["code"]) == (403, 403)
        answer = await edge.get(id, guest.port, e2b_traffic_access_token=token)
        assert answer.text == "hello"
        await edge.team.client.patch(f"/v1/sandboxes/{id}", json={"private_ports": False})
        assert (await edge.get(id, guest.port)).text == "hello"
    assert not any(token.encode() in head for head in heads)


async def test_the_agent_answers_to_one_token_in_all_lives(edge: Edge) -> None:
    id = await edge.create()
    token = (await edge.ports(id))["agent_token"]
    for _ in range(2):
        assert (await edge.get(id, 49983, "/health")).status_code == 204
        assert (await edge.get(id, 49983, "/metrics")).status_code == 401
        answer = await edge.get(id, 49983, "/metrics", X_Access_Token=token)
        assert answer.json()["cpu_count"] > 0
        await edge.act(id, "pause")
        await edge.act(id, "resume")
    assert (await edge.ports(id))["agent_token"] == token


async def test_a_file_is_had_with_a_signature_of_the_stable_token(edge: Edge) -> None:
    id = await edge.create()
    token = (await edge.ports(id))["agent_token"]
    headers = {"Content-Type": "application/octet-stream", "X-Access-Token": token}
    async with edge.client() as client:
        agent = {"Host": edge.host(id, 49983)}
        written = await client.post(
            "/files?path=note&username=root", content=b"hello", headers={**headers, **agent}
        )
        assert written.status_code == 200, written.text
        digest = hashlib.sha256(f"note:read:root:{token}".encode()).digest()
        signature = "v1_" + base64.b64encode(digest).decode().rstrip("=")
        query = f"path=note&username=root&signature={quote(signature)}"
        assert (await client.get(f"/files?{query}", headers=agent)).content == b"hello"
        wrong = await client.get(f"/files?{query.replace('note', 'other')}", headers=agent)
        assert wrong.status_code == 401


async def test_what_is_between_host_and_agent_is_not_there(edge: Edge, sandbox: str) -> None:
    token = (await edge.ports(sandbox))["agent_token"]
    for path in ("/init", "/tunnel?port=1"):
        answer = await edge.get(sandbox, 49983, path, X_Access_Token=token)
        assert (answer.status_code, answer.json()["code"]) == (404, 404)
    async with edge.client() as client:
        key = {"X-API-Key": edge.team.key}
        answer = await client.get(f"/v1/sandboxes/{sandbox}/ports/49983/health", headers=key)
        assert answer.status_code == 404


@pytest.mark.parametrize("port", ["0", "65536", "http"])
async def test_a_port_must_be_a_number(edge: Edge, sandbox: str, port: str) -> None:
    async with edge.client() as client:
        named = {"E2b-Sandbox-Id": sandbox, "E2b-Sandbox-Port": port}
        assert (await client.get("/", headers=named)).status_code == 400
        key = {"X-API-Key": edge.team.key}
        path = f"/v1/sandboxes/{sandbox}/ports/{port}/"
        assert (await client.get(path, headers=key)).status_code == 400


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 300_000,
        b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"",
    ],
)
async def test_an_answer_that_is_not_http_is_told_as_such(
    edge: Edge, sandbox: str, answer: bytes
) -> None:
    async with program(answering(answer)) as guest:
        found = await edge.get(sandbox, guest.port)
    assert found.status_code == 502
    assert "not HTTP" in found.json()["message"]


async def test_what_comes_after_an_answer_reaches_nobody(edge: Edge, sandbox: str) -> None:
    async with program(answering(_OK + b"HTTP/1.1 200 OK\r\nX-Smuggled: 1\r\n\r\n")) as guest:
        host = edge.host(sandbox, guest.port).encode()
        request = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host
        last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answers = await edge.raw(request + last)
    assert b"smuggled" not in answers.lower()
    assert answers.count(b"HTTP/1.1 200 OK") == 2


async def test_an_answer_that_breaks_off_is_cut_and_not_ended(edge: Edge, sandbox: str) -> None:
    for framing in (b"Content-Length: 50", b"Transfer-Encoding: chunked"):
        async with program(
            answering(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n5\r\nhello" % framing)
        ) as guest:
            host = edge.host(sandbox, guest.port).encode()
            reader, writer = await edge.connect()
            writer.write(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
            with pytest.raises(ConnectionResetError):
                await _rest(reader)
            writer.transport.abort()


async def test_a_client_that_leaves_leaves_no_connection_behind(edge: Edge, sandbox: str) -> None:
    left = asyncio.Event()

    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        try:
            await reader.read()
        finally:
            left.set()

    async with program(quiet) as guest:
        reader, writer = await edge.connect()
        host = edge.host(sandbox, guest.port).encode()
        writer.write(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        async with asyncio.timeout(patience(20)):
            await left.wait()


@pytest.mark.parametrize("action", ["pause", "delete"])
async def test_a_sandbox_that_stops_cuts_its_connections(edge: Edge, action: str) -> None:
    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        await reader.read()

    id = await edge.create()
    async with program(quiet) as guest:
        reader, writer = await edge.connect()
        host = edge.host(id, guest.port).encode()
        writer.write(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        await reader.readuntil(b"\r\n\r\n")
        if action == "pause":
            await edge.act(id, "pause")
        else:
            await edge.team.client.delete(f"/v1/sandboxes/{id}")
        with pytest.raises(ConnectionResetError):
            await _rest(reader)
        writer.transport.abort()


async def test_a_key_that_is_deleted_ends_what_it_opened(edge: Edge, sandbox: str) -> None:
    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        await reader.read()

    bearer = edge.team.bearer
    made = await edge.team.client.post("/v1/api-keys", json={}, headers=bearer)
    key = made.json()
    async with program(quiet) as guest:
        reader, writer = await edge.connect()
        path = f"/v1/sandboxes/{sandbox}/ports/{guest.port}/"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nX-API-Key: {key['key']}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        await edge.team.client.delete(f"/v1/api-keys/{key['id']}", headers=bearer)
        await edge.server.plane.revocations.sweep()
        with pytest.raises(ConnectionResetError):
            await _rest(reader)
        writer.transport.abort()


async def test_an_answer_before_the_end_of_the_request_arrives(edge: Edge, sandbox: str) -> None:
    refusal = b"HTTP/1.1 413 No\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig"
    size = 3_000_000
    async with program(answering(refusal)) as guest:  # it closes, and the kernel resets
        host = edge.host(sandbox, guest.port).encode()
        head = b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n" % (host, size)
        for _ in range(10):
            reader, writer = await edge.connect()
            writer.write(head + bytes(size))
            async with asyncio.timeout(patience(20)):
                assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
            writer.transport.abort()


async def test_a_client_that_speaks_to_a_program_that_is_gone_is_given_up(
    edge: Edge, sandbox: str
) -> None:
    users = edge.server.plane.activity.users_of
    upgraded = b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    async with program(answering(upgraded)) as guest:
        reader, writer = await edge.connect()
        host = edge.host(sandbox, guest.port).encode()
        head = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n" % host
        writer.write(head)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(10):
            await asyncio.sleep(0.02)
            writer.write(b"anybody?")
        writer.close()
        await eventually(lambda: not users(sandbox), 20)  # type: ignore[arg-type]


async def test_a_client_that_upgraded_keeps_a_sandbox_in_use(edge: Edge, sandbox: str) -> None:
    gone = asyncio.Event()

    async def open_for_long(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        try:
            await reader.read()
        finally:
            gone.set()

    users = edge.server.plane.activity.users_of
    async with program(open_for_long) as guest:
        reader, writer = await edge.connect()
        host = edge.host(sandbox, guest.port).encode()
        head = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n" % host
        writer.write(head)
        await reader.readuntil(b"\r\n\r\n")
        assert users(sandbox)  # type: ignore[arg-type]
        writer.transport.abort()
        async with asyncio.timeout(patience(20)):
            await gone.wait()
