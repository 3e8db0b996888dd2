"""What requests to ports know of a sandbox without asking the database is never old."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.control.store.records import SandboxUpdate
from wrenn_sandbox.control.store.sandboxes import AllSandboxes, Exposed
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
_exposed = AllSandboxes.exposed


async def _ok(sent: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    await anext(sent)
    yield _OK


@pytest.fixture
async def id(user: Team, host: HostDouble) -> str:
    """A running sandbox with a program on its port 3000."""
    host.ports[3000] = _ok
    created = await user.client.post("/v1/sandboxes", json={})
    return str(created.json()["id"])


@pytest.fixture
def visitor(faulty: Server) -> httpx2.AsyncClient:
    return faulty.client(checked=False)


async def _status(visitor: httpx2.AsyncClient, id: str) -> int:
    return (await visitor.get("/", headers={"Host": f"3000-{id}.localhost"})).status_code


async def test_each_change_of_a_sandbox_holds_for_the_next_request(
    user: Team, visitor: httpx2.AsyncClient, id: str
) -> None:
    path = f"/v1/sandboxes/{id}"
    for private, status in ((True, 403), (False, 200), (True, 403), (False, 200)):
        await user.client.patch(path, json={"private_ports": private})
        assert await _status(visitor, id) == status
    for action, status in (("pause", 502), ("resume", 200), ("pause", 502), ("resume", 200)):
        assert (await user.client.post(f"{path}/{action}")).status_code == 200
        assert await _status(visitor, id) == status
    assert (await user.client.delete(path)).status_code == 204
    assert await _status(visitor, id) == 502


async def test_what_was_read_before_a_change_is_not_kept(
    user: Team, visitor: httpx2.AsyncClient, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, go_on = asyncio.Event(), asyncio.Event()

    async def slow(table: AllSandboxes, sandbox_id: SandboxId) -> Exposed | None:
        found = await _exposed(table, sandbox_id)
        read.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(AllSandboxes, "exposed", slow)
    early = asyncio.create_task(_status(visitor, id))
    await read.wait()
    await user.client.patch(f"/v1/sandboxes/{id}", json={"private_ports": True})
    go_on.set()
    assert await early == 200
    assert await _status(visitor, id) == 403


async def test_many_requests_ask_the_database_once(
    faulty: Server, visitor: httpx2.AsyncClient, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def counted(table: AllSandboxes, sandbox_id: SandboxId) -> Exposed | None:
        nonlocal asked
        asked += 1
        return await _exposed(table, sandbox_id)

    monkeypatch.setattr(AllSandboxes, "exposed", counted)
    monkeypatch.setattr("wrenn_sandbox.control.service.ports.KNOWN_SEC", 3600.0)
    for _ in range(20):
        assert await _status(visitor, id) == 200
    assert 1 <= asked <= 5


@pytest.mark.slow
async def test_what_another_process_writes_holds_soon(
    settings: Settings, user: Team, visitor: httpx2.AsyncClient, id: str
) -> None:
    assert await _status(visitor, id) == 200
    other = Store(settings.sql_url)
    try:
        table = other.team(TeamId(user.team_id)).sandboxes
        await table.update(SandboxId(id), SandboxUpdate(private_ports=True), utc_now())
    finally:
        await other.close()
    async with asyncio.timeout(patience(30)):
        while await _status(visitor, id) != 403:
            pass
