"""Sandboxes as E2B's clients make, use and end them."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import pytest

from support.api_server import FakeClock, Server, Team, serve
from support.e2b import created, detail, listed
from support.host_double import HostDouble
from wrenn_sandbox.control.service.sandboxes import SandboxService
from wrenn_sandbox.control.store.records import Sandbox, SandboxUpdate
from wrenn_sandbox.errors import NoCapacity, NotResponding
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.settings import Settings


async def _status(team: Team, id: str) -> str:
    return str((await team.client.get(f"/v1/sandboxes/{id}")).json()["status"])


@pytest.mark.parametrize(
    ("path", "seconds"), [("/v2/sandboxes", 300), ("/sandboxes", 15)], ids=["v2", "v1"]
)
async def test_a_sandbox_of_e2b_has_a_timeout_after_which_it_is_deleted(
    settings: Settings, host: HostDouble, clock: FakeClock, path: str, seconds: int
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        body = {"metadata": {"a": "1"}, "envVars": {"B": "2"}}
        id = await created(team, path, **body)
        shown = await detail(team, id)
        assert shown.end_at == clock.now + timedelta(seconds=seconds)
        assert (shown.template_id, shown.alias, shown.client_id) == ("minimal", "minimal", "wrenn")
        assert (shown.cpu_count, shown.memory_mb, shown.state.value) == (1, 512, "running")
        assert shown.metadata == {"a": "1"}
        assert host.envs[SandboxId(id)] == {"B": "2"}
        assert shown.to_dict()["lifecycle"] == {"autoResume": False, "onTimeout": "kill"}
        clock.advance(seconds)
        await server.plane.deadlines.sweep()
        assert (await team.client.get(f"/sandboxes/{id}")).status_code == 404
        assert await _status(team, id) == "stopped"


async def test_a_sandbox_with_auto_pause_is_paused_and_connected_to_again(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        id = await created(team, autoPause=True, timeout=60)
        clock.advance(61)
        await server.plane.deadlines.sweep()
        shown = await detail(team, id)
        assert shown.state.value == "paused"
        assert shown.to_dict()["lifecycle"] == {"autoResume": False, "onTimeout": "pause"}
        answer = await team.client.post(f"/v2/sandboxes/{id}/connect", json={"timeout": 100})
        assert answer.status_code == 201
        shown = await detail(team, id)
        assert (shown.state.value, shown.end_at) == ("running", clock.now + timedelta(seconds=100))


async def test_what_was_paused_is_kept_whatever_its_timeout_was(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        id = await created(team, timeout=60)
        assert (await team.client.post(f"/sandboxes/{id}/pause", json={})).status_code == 204
        clock.advance(3600)
        await server.plane.deadlines.sweep()
        assert (await detail(team, id)).state.value == "paused"
        for path in ("timeout", "refreshes"):
            answer = await team.client.post(f"/sandboxes/{id}/{path}", json={"timeout": 9})
            assert answer.status_code in (400, 404), path
        answer = await team.client.post(f"/sandboxes/{id}/resume", json={"autoPause": True})
        assert answer.status_code == 201
        assert (await detail(team, id)).end_at == clock.now + timedelta(seconds=15)
        clock.advance(15)
        await server.plane.deadlines.sweep()
        assert await _status(team, id) == "paused"


async def test_a_resume_that_fails_leaves_what_is_paused_without_a_timeout(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        id = await created(team, timeout=60)
        await team.client.post(f"/sandboxes/{id}/pause")
        host.fail["resume"] = NoCapacity("The host is full", retry_after=7)
        answer = await team.client.post(f"/sandboxes/{id}/connect", json={"timeout": 60})
        assert (answer.status_code, answer.json()["code"]) == (503, 503)
        assert (answer.headers["retry-after"], answer.headers["should-retry"]) == ("7", "true")
        clock.advance(3600)
        await server.plane.deadlines.sweep()
        assert (await detail(team, id)).state.value == "paused"


async def test_a_timeout_is_set_anew_and_a_connection_only_extends_it(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        id = await created(team, timeout=60)

        async def left(path: str, **body: int) -> float:
            answer = await team.client.post(path, json=body)
            assert answer.status_code in (200, 204), answer.text
            return ((await detail(team, id)).end_at - clock.now).total_seconds()

        assert await left(f"/sandboxes/{id}/timeout", timeout=500) == 500
        assert await left(f"/sandboxes/{id}/connect", timeout=100) == 500
        assert await left(f"/v2/sandboxes/{id}/connect", timeout=700) == 700
        assert await left(f"/sandboxes/{id}/refreshes", duration=600) == 700
        assert await left(f"/sandboxes/{id}/refreshes", duration=800) == 800
        assert await left(f"/sandboxes/{id}/timeout", timeout=10) == 10
        assert await left(f"/sandboxes/{id}/timeout", timeout=0) == 1


async def test_a_connection_gives_no_timeout_to_what_has_none(faulty: Server, user: Team) -> None:
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    assert (await user.client.post(f"/v2/sandboxes/{id}/connect", json={})).status_code == 200
    assert (await detail(user, id)).end_at == datetime.fromisoformat("2100-01-01T00:00:00Z")


async def test_two_connections_to_what_is_paused_resume_it_once(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await created(user)
    await user.client.post(f"/sandboxes/{id}/pause")
    gate = host.hold("resume")
    path = f"/v2/sandboxes/{id}/connect"
    first = faulty.start(user.client.post(path))
    await gate.arrived.wait()
    second = faulty.start(user.client.post(path))
    gate.opened.set()
    assert ((await first).status_code, (await second).status_code) == (201, 200)
    assert [call for call, _ in host.calls].count("resume") == 1


async def test_connections_at_the_same_time_all_succeed(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await created(user)
    await user.client.post(f"/sandboxes/{id}/pause")
    path = f"/v2/sandboxes/{id}/connect"
    answers = await asyncio.gather(*(user.client.post(path) for _ in range(5)))
    assert sorted(each.status_code for each in answers) == [200, 200, 200, 200, 201]
    assert [call for call, _ in host.calls].count("resume") == 1


async def test_a_connection_to_what_is_paused_meanwhile_resumes_it(
    faulty: Server, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await created(user)
    update = SandboxService.update

    async def late(
        service: SandboxService, team_id: TeamId, sandbox_id: str, changed: SandboxUpdate
    ) -> Sandbox:
        await service.pause(team_id, sandbox_id)
        return await update(service, team_id, sandbox_id, changed)

    monkeypatch.setattr(SandboxService, "update", late)
    assert (await user.client.post(f"/v2/sandboxes/{id}/connect")).status_code == 201
    assert (await detail(user, id)).state.value == "running"


async def test_a_cold_start_is_asked_for_with_a_connection(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await created(user)
    await user.client.post(f"/sandboxes/{id}/pause")
    await user.client.post(f"/v2/sandboxes/{id}/connect", json={"memory": False})
    events = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert any("without memory" in str(each.get("reason")) for each in events)


async def test_a_guest_that_has_to_be_healthy_is_asked_before_a_pause(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await created(user)
    host.fail["metrics"] = NotResponding("The guest does not respond")
    path, body = f"/sandboxes/{id}/pause", {"requireHealthyGuest": True}
    answer = await user.client.post(path, json=body)
    assert (answer.status_code, answer.json()["code"]) == (503, 503)
    assert (await detail(user, id)).state.value == "running"
    host.fail.clear()
    assert (await user.client.post(path, json=body)).status_code == 204
    assert (await user.client.post(path, json=body)).status_code == 409


async def test_what_has_ended_is_not_there_for_e2b(faulty: Server, user: Team) -> None:
    id = await created(user)
    assert (await user.client.delete(f"/sandboxes/{id}")).status_code == 204
    for method, path in (
        ("DELETE", f"/sandboxes/{id}"),
        ("GET", f"/sandboxes/{id}"),
        ("POST", f"/sandboxes/{id}/pause"),
        ("POST", f"/v2/sandboxes/{id}/connect"),
        ("POST", f"/sandboxes/{id}/snapshots"),
        ("POST", f"/sandboxes/{id}/fork"),
    ):
        answer = await user.client.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (404, 404), path
    assert await listed(user) == await listed(user, "/sandboxes") == []


async def test_lists_of_e2b_filter_and_sort(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        user = await server.team()
        made = []
        for number in range(3):
            made.append(
                await created(user, timeout=9999, metadata={"n": str(number), "k ü": "b&c"})
            )
            clock.advance(60)
        await user.client.post(f"/sandboxes/{made[1]}/pause")
        both = [made[2], made[1], made[0]]
        assert await listed(user) == await listed(user, state="running,paused") == both
        assert await listed(user, order="asc") == both[::-1]
        assert await listed(user, state="paused") == [made[1]]
        assert await listed(user, "/sandboxes") == [made[2], made[0]]
        encoded = "k%2520%25C3%25BC=b%2526c&n=2"
        assert await listed(user, metadata=encoded) == [made[2]]
        assert await listed(user, "/sandboxes", metadata="n=1") == []
        assert await listed(user, template="minimal:default") == both
        assert await listed(user, template="another") == []
        assert await listed(user, startedAfter="2026-11-01T12:00:30Z") == both[:2]
        assert await listed(await server.team()) == []


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_of_e2b_name_the_next_one(faulty: Server, user: Team, order: str) -> None:
    made = [await created(user) for _ in range(5)]
    seen: list[str] = []
    query = {"limit": "2", "order": order}
    while True:
        answer = await user.client.get("/v2/sandboxes", params=query)
        seen += [each["sandboxID"] for each in answer.json()]
        if "x-next-token" not in answer.headers:
            break
        query["nextToken"] = answer.headers["x-next-token"]
    assert seen == (made if order == "asc" else made[::-1])


async def test_network_rules_of_e2b(faulty: Server, user: Team, host: HostDouble) -> None:
    allowed = ["203.0.113.9", "*.Example.com"]
    network: dict[str, object] = {
        "allowOut": allowed,
        "denyOut": ["0.0.0.0/0"],
        "allowPublicTraffic": None,
    }
    id = await created(user, network=network, allow_internet_access=True)
    public = {"allowPublicTraffic": True}
    shown = (await detail(user, id)).to_dict()
    assert shown["network"] == {
        "allowOut": ["203.0.113.9/32", "*.example.com"],
        "denyOut": ["0.0.0.0/0"],
        **public,
    }
    path = f"/sandboxes/{id}/network"
    answer = await user.client.put(path, json={"allow_internet_access": False})
    assert answer.status_code == 204
    shown = (await detail(user, id)).to_dict()
    assert shown["network"] == {"allowOut": [], "denyOut": [], **public}
    assert shown["allowInternetAccess"] is False


async def test_ports_of_e2b_are_reached_with_the_tokens_of_the_sandbox(
    faulty: Server, user: Team
) -> None:
    made = await user.client.post("/v2/sandboxes", json={"templateID": "minimal"})
    assert "trafficAccessToken" not in made.json() or made.json()["trafficAccessToken"] is None
    body = {"templateID": "minimal", "network": {"allowPublicTraffic": False}}
    private = (await user.client.post("/v2/sandboxes", json=body)).json()
    ports = (await user.client.get(f"/v1/sandboxes/{private['sandboxID']}/ports")).json()
    assert (ports["private"], ports["domain"]) == (True, private["domain"])
    assert ports["token"] == private["trafficAccessToken"]
    assert ports["agent_token"] == private["envdAccessToken"]
    again = await user.client.post(f"/v2/sandboxes/{private['sandboxID']}/connect")
    assert again.json() == private
    shown = (await detail(user, private["sandboxID"])).to_dict()
    assert shown["envdAccessToken"] == private["envdAccessToken"]
    assert shown["network"]["allowPublicTraffic"] is False


async def test_traffic_resumes_what_has_auto_pause_and_auto_resume(
    faulty: Server, user: Team
) -> None:
    body = {"templateID": "minimal", "autoResume": {"enabled": True}}
    answer = await user.client.post("/v2/sandboxes", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, 400)
    id = await created(user, autoPause=True, autoResume={"enabled": True})
    assert (await user.client.get(f"/v1/sandboxes/{id}")).json()["auto_resume"] is True
    await user.client.post(f"/sandboxes/{id}/pause")
    shown = (await detail(user, id)).to_dict()
    assert shown["lifecycle"] == {"autoResume": True, "onTimeout": "pause"}
    assert shown["endAt"] < "2100"  # which traffic moves away


async def test_a_create_of_e2b_may_be_sent_again(faulty: Server, user: Team) -> None:
    headers = {"Idempotency-Key": "0b5b"}

    async def create(**body: object) -> tuple[int, object]:
        json = {"templateID": "minimal", **body}
        answer = await user.client.post("/v2/sandboxes", json=json, headers=headers)
        return answer.status_code, answer.json()

    first = await create()
    assert first[0] == 201
    assert await create() == first
    status, body = await create(timeout=9)
    assert (status, body["error_code"]) == (422, "idempotency_key_reused")  # type: ignore[index]
    assert len(await listed(user)) == 1


async def test_bodies_of_unknown_length_are_read(faulty: Server, user: Team) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"templateID": '
        yield b'"minimal"}'

    headers = {"Content-Type": "application/json"}
    answer = await user.client.post("/v2/sandboxes", content=pieces(), headers=headers)
    assert answer.status_code == 201


async def test_the_team_of_a_key(faulty: Server, user: Team) -> None:
    wanted = {"teamID": user.team_id, "name": user.team_id, "isDefault": True}
    answer = await user.client.get("/teams")
    assert answer.json() == [{**wanted, "apiKey": user.key}]
    answer = await faulty.client(user.bearer).get("/teams")
    assert answer.json() == [{**wanted, "apiKey": ""}]
