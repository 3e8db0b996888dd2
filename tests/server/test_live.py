"""What only a real server on a real port shows: clients that leave, and the cost of a command."""

import asyncio
import socket
import statistics
import time
from collections.abc import AsyncIterator

import httpx2
import pytest
import uvicorn

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.ids import SandboxId

pytestmark = pytest.mark.usefixtures("no_blocking_calls", "quiet_logs")

_CALLS = 200
_OVERHEAD_MS = {True: 10.0, False: 20.0}
"""On SQLite and on PostgreSQL; measured on two cores: 1.3 to 5.8, by how busy their host is."""


@pytest.fixture
async def port(faulty: Server) -> AsyncIterator[int]:
    """The port on which the server with the faulty host listens."""
    listening = asyncio.Event()
    ports = []

    class Listener(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ports.append(self.servers[0].sockets[0].getsockname()[1])
            listening.set()

    config = uvicorn.Config(faulty.app, port=0, lifespan="off", log_config=None, ws="none")
    server = Listener(config)
    task = asyncio.create_task(server._serve())
    await listening.wait()
    yield ports[0]
    server.should_exit = True
    await task


def _request(
    user: Team, method: str, path: str, body: bytes = b"", length: int | None = None
) -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: wrenn.test\r\nX-API-Key: {user.key}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


async def test_a_client_that_hangs_up_does_not_stop_a_create(
    host: HostDouble, faulty: Server, user: Team, port: int
) -> None:
    gate = host.hold("create")
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(user, "POST", "/v1/sandboxes"))
    await gate.arrived.wait()
    writer.transport.abort()
    (sandbox,) = (await user.client.get("/v1/sandboxes")).json()
    gate.opened.set()
    await faulty.plane.operations.wait_for_others(SandboxId(sandbox["id"]))
    (sandbox,) = (await user.client.get("/v1/sandboxes")).json()
    assert sandbox["status"] == "running"
    assert list(host.phases) == [sandbox["id"]]


async def test_a_body_that_ends_early_does_nothing(host: HostDouble, user: Team, port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(user, "POST", "/v1/sandboxes", b"{", length=10))
    await writer.drain()
    writer.transport.abort()
    assert (await user.client.get("/v1/sandboxes")).json() == []
    assert host.phases == {}


async def test_headers_that_are_not_text(user: Team, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"X-API-Key: \xff\xfe\r\nAuthorization: Bearer \xff\r\n\r\n"
    )
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 401 ")
    writer.close()
    await writer.wait_closed()


async def test_what_the_api_adds_to_a_command(
    faulty: Server, user: Team, database_url: str | None
) -> None:
    """Median of the processor's time for a call of a host that answers at once, client included.

    Time on the clock is measured against the guest's, on a real machine, in tests/vm.
    """
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=faulty.app),
        base_url="http://wrenn.test",
        headers={"X-API-Key": user.key},
    ) as client:
        times = []
        for _ in range(_CALLS):
            begin = time.process_time()
            answer = await client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
            times.append((time.process_time() - begin) * 1000)
            assert answer.status_code == 200
    assert statistics.median(times) < _OVERHEAD_MS[database_url is None]
