"""Requests to ports of paused sandboxes."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from support.api_server import Server, eventually, make_settings, serve
from support.host_double import HostDouble
from support.ports import Edge, answering, program
from wrenn_sandbox.control.store.sandboxes import AllSandboxes, Exposed
from wrenn_sandbox.errors import AgentError, HostFailure
from wrenn_sandbox.ids import SandboxId

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


async def _ok(sent: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    await anext(sent)
    yield _OK


@pytest_asyncio.fixture
async def played(host: HostDouble, tmp_path: Path) -> AsyncIterator[Server]:
    """A server over a host that resumes when the test says so."""
    host.ports[3000] = _ok
    async with serve(make_settings(tmp_path / "data", None), host) as server:
        yield server


async def _paused(client: httpx2.AsyncClient, **body: object) -> str:
    created = await client.post("/v1/sandboxes", json=body)
    id = str(created.json()["id"])
    assert (await client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
    return id


async def _visit(client: httpx2.AsyncClient, id: str) -> httpx2.Response:
    return await client.get("/", headers={"Host": f"3000-{id}.localhost"})


def _agent(id: str) -> dict[str, str]:
    return {"Host": f"49983-{id}.localhost"}


async def test_a_hundred_requests_at_once_cause_one_resume(
    played: Server, host: HostDouble
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    id = await _paused(team.client, auto_resume=True)
    gate = host.hold("resume")
    visits = [played.start(_visit(visitor, id)) for _ in range(100)]
    await gate.arrived.wait()
    gate.opened.set()
    assert [(await each).text for each in visits] == ["hello"] * 100
    assert [call for call, _ in host.calls].count("resume") == 1
    events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert [(each["event"], each["actor"]) for each in events[:2]] == [
        ("resumed", "traffic"),
        ("resume", "traffic"),
    ]


async def test_a_request_waits_for_a_pause_that_is_under_way(
    played: Server, host: HostDouble
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    created = await team.client.post("/v1/sandboxes", json={"auto_resume": True})
    id = created.json()["id"]
    gate = host.hold("pause")
    pause = played.start(team.client.post(f"/v1/sandboxes/{id}/pause"))
    await gate.arrived.wait()
    visit = played.start(_visit(visitor, id))
    gate.opened.set()
    await pause
    assert (await visit).text == "hello"


async def test_requests_that_wait_for_a_sandbox_ask_the_store_together(
    played: Server, host: HostDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    created = await team.client.post("/v1/sandboxes", json={"auto_resume": True})
    id = created.json()["id"]
    exposed, asked = AllSandboxes.exposed, 0

    async def counted(sandboxes: AllSandboxes, sandbox_id: SandboxId) -> Exposed | None:
        nonlocal asked
        asked += 1
        return await exposed(sandboxes, sandbox_id)

    monkeypatch.setattr(AllSandboxes, "exposed", counted)
    gate = host.hold("pause")
    pause = played.start(team.client.post(f"/v1/sandboxes/{id}/pause"))
    await gate.arrived.wait()
    began = time.monotonic()
    visits = [played.start(_visit(visitor, id)) for _ in range(100)]
    await eventually(lambda: asked > 100)
    await asyncio.sleep(0.5)
    gate.opened.set()
    await pause
    assert [(await each).text for each in visits] == ["hello"] * 100
    assert asked <= 100 + 20 * (time.monotonic() - began) + 5, "one for each, then 20 a second"


async def test_without_auto_resume_a_paused_sandbox_stays_paused(
    played: Server, host: HostDouble
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    id = await _paused(team.client)
    assert (await _visit(visitor, id)).status_code == 502
    await team.client.patch(f"/v1/sandboxes/{id}", json={"auto_resume": True})
    assert (await _visit(visitor, id)).text == "hello"


async def test_nobody_without_the_token_of_private_ports_resumes_a_sandbox(
    played: Server, host: HostDouble
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    id = await _paused(team.client, auto_resume=True, private_ports=True)
    assert (await _visit(visitor, id)).status_code == 403
    assert (await visitor.get("/metrics", headers=_agent(id))).status_code == 401
    health = await visitor.get("/health", headers=_agent(id))
    assert (health.status_code, health.json()["code"]) == (502, 502)
    assert [call for call, _ in host.calls].count("resume") == 0


async def test_a_stranger_who_asks_for_the_health_of_a_private_sandbox_is_no_activity(
    played: Server, host: HostDouble
) -> None:
    host.ports[49983] = _ok
    team, visitor = await played.team(), played.client(checked=False)
    created = await team.client.post("/v1/sandboxes", json={"private_ports": True})
    id = created.json()["id"]

    async def last_active() -> str:
        answer = await team.client.get(f"/v1/sandboxes/{id}")
        return str(answer.json()["last_active_at"])

    before = await last_active()
    assert (await visitor.get("/health", headers=_agent(id))).text == "hello"
    assert await last_active() == before
    token = (await team.client.get(f"/v1/sandboxes/{id}/ports")).json()["agent_token"]
    shown = {**_agent(id), "X-Access-Token": token}
    assert (await visitor.get("/health", headers=shown)).text == "hello"
    assert await last_active() > before


async def test_a_failed_resume_is_not_tried_again_by_each_request(
    played: Server, host: HostDouble
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    id = await _paused(team.client, auto_resume=True)
    host.fail["resume"] = HostFailure("It does not start")
    for _ in range(5):
        answer = await _visit(visitor, id)
        assert (answer.status_code, answer.json()["message"]) == (502, "It does not start")
    assert [call for call, _ in host.calls].count("resume") == 1


async def test_a_deadline_leaves_time_after_a_resume(played: Server, host: HostDouble) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    id = await _paused(team.client, auto_resume=True, deadline_sec=200)
    before = (await team.client.get(f"/v1/sandboxes/{id}")).json()["deadline_at"]
    assert (await _visit(visitor, id)).text == "hello"
    after = (await team.client.get(f"/v1/sandboxes/{id}")).json()["deadline_at"]
    moved = datetime.fromisoformat(after) - datetime.fromisoformat(before)
    assert moved >= timedelta(seconds=100)


async def test_a_deadline_that_is_moved_away_during_a_resume_stays_there(
    played: Server, host: HostDouble
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    id = await _paused(team.client, auto_resume=True, deadline_sec=200)
    gate = host.hold("resume")
    visit = played.start(_visit(visitor, id))
    await gate.arrived.wait()
    moved = await team.client.patch(f"/v1/sandboxes/{id}", json={"deadline_sec": 4000})
    gate.opened.set()
    assert (await visit).text == "hello"
    shown = (await team.client.get(f"/v1/sandboxes/{id}")).json()
    assert shown["deadline_at"] == moved.json()["deadline_at"]


async def test_a_team_over_its_quota_is_told_so_by_a_resume(
    host: HostDouble, tmp_path: Path
) -> None:
    host.ports[3000] = _ok
    settings = make_settings(tmp_path / "data", None, quota_running=1)
    async with serve(settings, host) as server:
        team, visitor = await server.team(), server.client(checked=False)
        id = await _paused(team.client, auto_resume=True, deadline_sec=60)
        before = (await team.client.get(f"/v1/sandboxes/{id}")).json()["deadline_at"]
        assert (await team.client.post("/v1/sandboxes", json={})).status_code == 201
        for _ in range(2):
            answer = await _visit(visitor, id)
            assert (answer.status_code, answer.json()["code"]) == (429, 429)
        after = (await team.client.get(f"/v1/sandboxes/{id}")).json()["deadline_at"]
        assert after == before, "what is not resumed ends when it should"


async def test_connections_to_ports_are_bounded_and_given_back(
    host: HostDouble, tmp_path: Path
) -> None:
    opened = asyncio.Event()

    async def waiting(sent: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        await anext(sent)
        await opened.wait()
        yield _OK

    host.ports |= {3000: waiting, 3001: _ok, 49983: _ok}
    settings = make_settings(tmp_path / "data", None, port_connections_per_sandbox=2)
    async with serve(settings, host) as server:
        team, visitor = await server.team(), server.client(checked=False)
        id = (await team.client.post("/v1/sandboxes", json={})).json()["id"]
        for _ in range(2):
            host.called["connect"].clear()
            server.start(_visit(visitor, id))
            await host.called["connect"].wait()
        refused = await _visit(visitor, id)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await visitor.get("/health", headers=_agent(id))).status_code == 429
        token = (await team.client.get(f"/v1/sandboxes/{id}/ports")).json()["agent_token"]
        shown = {**_agent(id), "X-Access-Token": token}
        assert (await visitor.get("/metrics", headers=shown)).text == "hello"
        path = f"/v1/sandboxes/{id}/ports/3001/"
        answer = await visitor.get(path, headers={"X-API-Key": team.key})
        assert answer.text == "hello", "strangers leave room for its owner"
        opened.set()
        await asyncio.gather(*server.tasks)
        assert (await _visit(visitor, id)).text == "hello"


async def test_one_client_behind_a_proxy_has_its_share_of_requests_to_ports(
    host: HostDouble, tmp_path: Path
) -> None:
    opened = asyncio.Event()

    async def waiting(sent: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        await anext(sent)
        await opened.wait()
        yield _OK

    host.ports |= {3000: waiting, 3001: _ok}
    settings = make_settings(
        tmp_path / "data", None, max_connections_per_address=2, trusted_proxies="127.0.0.1"
    )
    async with serve(settings, host) as server:
        team, visitor = await server.team(), server.client(checked=False)
        id = (await team.client.post("/v1/sandboxes", json={})).json()["id"]

        async def visit(port: int, client: str) -> httpx2.Response:
            headers = {"Host": f"{port}-{id}.localhost", "X-Forwarded-For": client}
            return await visitor.get("/", headers=headers)

        for _ in range(2):
            host.called["connect"].clear()
            server.start(visit(3000, "192.0.2.1"))
            await host.called["connect"].wait()
        refused = await visit(3001, "192.0.2.1")
        assert (refused.status_code, refused.json()["code"]) == (429, 429)
        api = await visitor.get("/health", headers={"X-Forwarded-For": "192.0.2.1"})
        assert api.status_code == 429, "they count together with those to the API"
        assert (await visit(3001, "192.0.2.2")).text == "hello"
        opened.set()
        await asyncio.gather(*server.tasks)
        assert (await visit(3001, "192.0.2.1")).text == "hello"


async def test_a_guest_that_does_not_respond_is_told_as_such(
    played: Server, host: HostDouble
) -> None:
    team, visitor = await played.team(), played.client(checked=False)
    id = (await team.client.post("/v1/sandboxes", json={})).json()["id"]
    host.fail["connect"] = AgentError("The guest does not respond")
    answer = await _visit(visitor, id)
    assert (answer.status_code, answer.json()["message"]) == (502, "The guest does not respond")


async def test_a_program_that_says_nothing_is_given_up(host: HostDouble, tmp_path: Path) -> None:
    async def silent(sent: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    host.ports[3000] = silent
    settings = make_settings(tmp_path / "data", None, port_idle_sec=0.2)
    async with serve(settings, host) as server:
        team, visitor = await server.team(), server.client(checked=False)
        id = (await team.client.post("/v1/sandboxes", json={})).json()["id"]
        answer = await _visit(visitor, id)
        assert (answer.status_code, answer.json()["code"]) == (502, 502)


@pytest.mark.slow
async def test_a_connection_of_a_client_outlives_a_pause_and_resume(tmp_path: Path) -> None:
    async with (
        Edge.serving(make_settings(tmp_path / "data", None)) as edge,
        program(answering(_OK)) as guest,
        edge.client() as client,
    ):
        id = await edge.create(auto_resume=True)
        host = {"Host": edge.host(id, guest.port)}
        for _ in range(2):
            assert (await client.get("/", headers=host)).text == "hello"
            await edge.act(id, "pause")
        assert guest.connections == 2
