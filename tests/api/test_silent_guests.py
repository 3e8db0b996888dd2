"""Guests that do not respond: noticed when a call fails, told of, noticed when they are back."""

import time
from collections.abc import AsyncIterator
from datetime import timedelta

import httpx2
import pytest

from support.api_server import FakeClock, Server, Team, eventually, serve
from support.host_double import HostDouble
from support.samples import Samples
from wrenn_sandbox.control.store.events import PolicyChange
from wrenn_sandbox.errors import AgentError, HostFailure, NotResponding
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import CommandResult, Egress

pytestmark = pytest.mark.slow

_CHECK_SEC = 0.3
_SINCE = "guest not responding since 2026-11-01T12:00:00Z"
_SILENT = AgentError("The sandbox did not answer in time")
_UNREACHABLE = NotResponding("The guest cannot be reached")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"guest_check_sec": _CHECK_SEC})


@pytest.fixture
async def server(settings: Settings, host: HostDouble, clock: FakeClock) -> AsyncIterator[Server]:
    async with serve(settings, host, clock) as server:
        yield server


async def _create(team: Team) -> SandboxId:
    return SandboxId((await team.client.post("/v1/sandboxes")).json()["id"])


async def _events(team: Team, id: str) -> list[dict[str, str]]:
    found = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert isinstance(found, list)
    return list(reversed(found))


async def _kinds(team: Team, id: str) -> list[str]:
    return [each["event"] for each in await _events(team, id)][3:]


def _deafen(host: HostDouble) -> None:
    host.fail["health"] = _UNREACHABLE
    for call in ("exec", "metrics", "list_directory", "processes", "write_file"):
        host.fail[call] = _SILENT


def _message(answer: httpx2.Response) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "agent_error")
    return str(answer.json()["error"]["message"])


async def _gauge(server: Server) -> float | None:
    samples = await Samples.of(server.client())
    return samples.value("wrenn_sandboxes_not_responding")


async def test_a_healthy_guest_is_never_asked(server: Server, team: Team, host: HostDouble) -> None:
    id = await _create(team)
    await team.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    await server.plane.health.sweep()
    assert ("health", id) not in host.calls


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "exec", {"cmd": "true"}),
        ("GET", "metrics", None),
        ("POST", "files/list", {"path": "/"}),
        ("GET", "processes", None),
    ],
)
async def test_every_call_says_since_when_and_what_to_do(
    server: Server, team: Team, host: HostDouble, method: str, path: str, body: object
) -> None:
    id = await _create(team)
    _deafen(host)
    for _ in range(2):
        answer = await team.client.request(method, f"/v1/sandboxes/{id}/{path}", json=body)
        message = _message(answer)
        assert message.startswith("G" + _SINCE[1:])
        assert "pause" in message
        assert "wrenn sandbox resume --reboot" in message
    assert await _kinds(team, id) == ["not_responding"]
    event = (await _events(team, id))[-1]
    assert (event["from"], event["to"], event["actor"]) == ("running", "running", "health")
    assert event["reason"] == _SINCE
    shown = (await team.client.get(f"/v1/sandboxes/{id}")).json()
    assert (shown["status"], shown["reason"]) == ("running", _SINCE)
    assert await _gauge(server) == 1


async def test_a_silent_guest_is_asked_before_anything_else(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    _deafen(host)
    await team.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
    host.calls.clear()
    await team.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
    assert {call for call, _ in host.calls} == {"health"}


async def test_metrics_come_in_time_or_not_at_all(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    host.hold("metrics")
    host.hold("health")
    for _ in range(2):
        began = time.monotonic()
        assert "not responding" in _message(await team.client.get(f"/v1/sandboxes/{id}/metrics"))
        assert time.monotonic() - began < 3
    assert await _kinds(team, id) == ["not_responding"]


async def test_a_call_that_fails_in_a_guest_that_responds(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    host.fail["exec"] = AgentError("no processes left")
    answer = await team.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
    assert _message(answer) == "no processes left"
    assert await _kinds(team, id) == []
    assert await _gauge(server) == 0


async def test_a_command_out_of_time_raises_the_suspicion(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    over = CommandResult(exit_code=137, stdout=b"", stderr=b"", duration_ms=1, timed_out=True)
    host.answer = lambda _: over
    host.fail["health"] = _UNREACHABLE
    answer = await team.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "bomb"})
    assert answer.status_code == 504
    await eventually(lambda: id in server.plane.health._silent)
    assert await _kinds(team, id) == ["not_responding"]


async def test_a_guest_that_responds_again_is_noticed(
    server: Server, team: Team, host: HostDouble, clock: FakeClock
) -> None:
    id = await _create(team)
    _deafen(host)
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    clock.advance(60)
    await server.plane.health.sweep()
    assert await _kinds(team, id) == ["not_responding"]
    host.fail.clear()
    await server.plane.health.sweep()
    assert await _kinds(team, id) == ["not_responding", "responding"]
    shown = (await team.client.get(f"/v1/sandboxes/{id}")).json()
    assert "reason" not in shown
    assert await _gauge(server) == 0
    assert (await team.client.get(f"/v1/sandboxes/{id}/metrics")).status_code == 200
    _deafen(host)
    answer = await team.client.get(f"/v1/sandboxes/{id}/metrics")
    assert "12:01:00Z" in _message(answer), "a new silence has a time of its own"


async def test_the_first_call_to_one_that_is_back(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    _deafen(host)
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    host.fail.clear()
    answer = await team.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
    assert answer.status_code == 200
    assert await _kinds(team, id) == ["not_responding", "responding"]


async def test_a_silence_ends_with_the_machine(
    server: Server, team: Team, host: HostDouble, clock: FakeClock
) -> None:
    id = await _create(team)
    _deafen(host)
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    paused = (await team.client.post(f"/v1/sandboxes/{id}/pause")).json()
    assert (paused["status"], paused["reason"]) == ("paused", _SINCE)
    await server.plane.health.sweep()
    assert await _gauge(server) == 0
    host.fail.clear()
    resumed = (await team.client.post(f"/v1/sandboxes/{id}/resume")).json()
    assert "reason" not in resumed
    await server.plane.health.sweep()
    assert await _kinds(team, id) == ["not_responding", "pause", "paused", "resume", "resumed"]


async def test_a_copy_of_a_silent_guest_ends_no_silence_and_a_rollback_does(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    _deafen(host)
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    for verb, body in (("snapshots", {"name": "mine"}), ("fork", {})):
        answer = await team.client.post(f"/v1/sandboxes/{id}/{verb}", json=body)
        assert answer.status_code == 201
    assert await server.plane.store.silences.all() != {}
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    kinds = await _kinds(team, id)
    assert kinds == ["not_responding", "checkpoint", "checkpointed", "fork", "forked"]
    assert (await team.client.get(f"/v1/sandboxes/{id}")).json()["reason"] == _SINCE
    host.fail.clear()
    body = {"snapshot": "mine"}
    rolled = await team.client.post(f"/v1/sandboxes/{id}/rollback", json=body)
    assert "reason" not in rolled.json()
    assert await server.plane.store.silences.all() == {}
    await server.plane.health.sweep()
    assert (await _kinds(team, id))[-1] == "rolled_back"
    assert await _gauge(server) == 0


async def test_a_pause_and_a_resume_between_two_looks(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    _deafen(host)
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    await team.client.post(f"/v1/sandboxes/{id}/pause")
    host.fail.clear()
    await team.client.post(f"/v1/sandboxes/{id}/resume")
    await server.plane.health.sweep()
    assert (await _kinds(team, id))[-1] == "resumed"
    assert await _gauge(server) == 0


async def test_a_new_server_knows_which_guests_are_silent(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        id, other = await _create(team), await _create(team)
        _deafen(host)
        await team.client.get(f"/v1/sandboxes/{id}/metrics")
        change = PolicyChange(Egress(), "reconciler", "again", clock())
        sandbox = await server.plane.store.all_sandboxes.get(id)
        assert sandbox is not None
        await server.plane.store.policies.note(sandbox, change)
        host.fail.clear()
        await team.client.get(f"/v1/sandboxes/{other}/metrics")
        _deafen(host)
    clock.advance(3600)
    async with serve(settings, host, clock) as server:
        assert await server.plane.store.silences.all() == {id: clock() - timedelta(hours=1)}
        await eventually(lambda: id in server.plane.health._silent)
        client = server.client({"X-API-Key": team.key})
        answer = await client.get(f"/v1/sandboxes/{id}/metrics")
        assert _SINCE[1:] in _message(answer)
        assert await _gauge(server) == 1


async def test_a_sandbox_that_is_paused_while_it_is_asked(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    _deafen(host)
    asking = server.start(team.client.get(f"/v1/sandboxes/{id}/metrics"))
    await host.called["health"].wait()
    assert (await team.client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
    _message(await asking)
    assert await _kinds(team, id) == ["pause", "paused"]


async def test_only_the_failed_pause_of_a_silent_guest_keeps_it_running(
    server: Server, team: Team, host: HostDouble
) -> None:
    id = await _create(team)
    _deafen(host)
    await team.client.get(f"/v1/sandboxes/{id}/metrics")
    host.fail["pause"] = HostFailure("The disk is full")
    assert (await team.client.post(f"/v1/sandboxes/{id}/pause")).status_code == 502
    assert "not responding" in _message(await team.client.get(f"/v1/sandboxes/{id}/metrics"))
