"""Pause, resume, deletion and failures in every order, on a host that fails on command."""

import asyncio

import httpx2
import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.errors import HostFailure, NoCapacity, NotFound
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import Phase


@pytest.fixture
async def id(user: Team) -> str:
    return str((await user.client.post("/v1/sandboxes")).json()["id"])


async def _post(team: Team, id: str, action: str) -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/{action}")


async def _status(team: Team, id: str) -> str:
    return str((await team.client.get(f"/v1/sandboxes/{id}")).json()["status"])


async def _history(team: Team, id: str) -> list[str]:
    events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    return [event["event"] for event in reversed(events)]


async def test_pause_and_resume(host: HostDouble, user: Team, id: str) -> None:
    before = (await user.client.get(f"/v1/sandboxes/{id}")).json()
    paused = await _post(user, id, "pause")
    assert (paused.status_code, paused.json()["status"]) == (200, "paused")
    assert host.phases == {SandboxId(id): Phase.PAUSED}
    resumed = await _post(user, id, "resume")
    assert (resumed.status_code, resumed.json()["status"]) == (200, "running")
    assert resumed.json()["started_at"] > before["started_at"]
    assert resumed.json()["last_active_at"] == resumed.json()["started_at"]


@pytest.mark.parametrize(("first", "refused"), [("pause", "pause"), (None, "resume")])
async def test_what_the_state_does_not_allow(
    user: Team, id: str, first: str | None, refused: str
) -> None:
    if first is not None:
        await _post(user, id, first)
    answer = await _post(user, id, refused)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    assert ("paused" if first else "running") in answer.json()["error"]["message"]


@pytest.mark.parametrize("action", ["pause", "resume"])
async def test_one_of_two_operations_at_once_wins(
    host: HostDouble, user: Team, id: str, action: str
) -> None:
    if action == "resume":
        await _post(user, id, "pause")
    answers = await asyncio.gather(*(_post(user, id, action) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    assert [call for call, _ in host.calls].count(action) == 1


async def test_what_is_in_flight_shows_as_the_state_it_left(
    host: HostDouble, faulty: Server, user: Team, id: str
) -> None:
    gate = host.hold("pause")
    pausing = faulty.start(_post(user, id, "pause"))
    await gate.arrived.wait()
    assert await _status(user, id) == "running"
    for action in ("pause", "resume", "ping"):
        answer = await _post(user, id, action)
        assert answer.status_code == 409
        assert "pausing" in answer.json()["error"]["message"]
    gate.opened.set()
    assert (await pausing).status_code == 200


@pytest.mark.parametrize(
    ("action", "state", "event"),
    [("pause", "running", "pause_failed"), ("resume", "paused", "resume_failed")],
)
async def test_a_failure_changes_nothing_and_can_be_repeated(
    host: HostDouble, user: Team, id: str, action: str, state: str, event: str
) -> None:
    if action == "resume":
        await _post(user, id, "pause")
    host.fail[action] = HostFailure("The disk failed", detail="/var/lib/secret")
    answer = await _post(user, id, action)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "agent_error")
    assert await _status(user, id) == state
    events = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert (events[0]["event"], events[0]["reason"]) == (event, "The disk failed")
    del host.fail[action]
    assert (await _post(user, id, action)).status_code == 200


async def test_no_room_to_resume(host: HostDouble, user: Team, id: str) -> None:
    await _post(user, id, "pause")
    host.fail["resume"] = NoCapacity("The host is full", retry_after=2.5)
    answer = await _post(user, id, "resume")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_capacity")
    assert answer.headers["retry-after"] == "3"
    assert await _status(user, id) == "paused"


async def test_a_failed_create_leaves_a_reason_and_nothing_else(
    host: HostDouble, user: Team
) -> None:
    host.fail["create"] = HostFailure("The machine did not start", detail="/secret")
    answer = await user.client.post("/v1/sandboxes")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "agent_error")
    (sandbox,) = (await user.client.get("/v1/sandboxes")).json()
    assert (sandbox["status"], sandbox["reason"]) == ("error", "The machine did not start")
    assert host.phases == {}
    assert (await user.client.delete(f"/v1/sandboxes/{sandbox['id']}")).status_code == 204
    assert await _status(user, sandbox["id"]) == "stopped"


async def test_a_full_host_leaves_no_sandbox(host: HostDouble, user: Team) -> None:
    host.fail["create"] = NoCapacity("The host is full")
    answer = await user.client.post("/v1/sandboxes")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_capacity")
    assert (await user.client.get("/v1/sandboxes")).json() == []


async def test_an_image_that_went_away(host: HostDouble, user: Team) -> None:
    host.fail["create"] = NotFound("There is no such image")
    assert (await user.client.post("/v1/sandboxes")).status_code == 404


async def test_delete_while_starting(host: HostDouble, faulty: Server, user: Team) -> None:
    gate = host.hold("create")
    creating = faulty.start(user.client.post("/v1/sandboxes"))
    await gate.arrived.wait()
    (sandbox,) = (await user.client.get("/v1/sandboxes")).json()
    assert sandbox["status"] == "pending"
    deleting = faulty.start(user.client.delete(f"/v1/sandboxes/{sandbox['id']}"))
    await host.called["destroy"].wait()
    gate.opened.set()
    assert (await creating).status_code in (409, 502)
    assert (await deleting).status_code == 204
    assert await _status(user, sandbox["id"]) == "stopped"
    assert host.phases == {}
    assert "started" not in await _history(user, sandbox["id"])


@pytest.mark.parametrize("action", ["pause", "resume"])
async def test_delete_while_something_is_in_flight(
    host: HostDouble, faulty: Server, user: Team, id: str, action: str
) -> None:
    if action == "resume":
        await _post(user, id, "pause")
    gate = host.hold(action)
    acting = faulty.start(_post(user, id, action))
    await gate.arrived.wait()
    deleting = faulty.start(user.client.delete(f"/v1/sandboxes/{id}"))
    await host.called["destroy"].wait()
    gate.opened.set()
    assert (await acting).status_code in (404, 409)
    assert (await deleting).status_code == 204
    assert await _status(user, id) == "stopped"
    assert host.phases == {}


async def test_many_deletes_are_one(host: HostDouble, user: Team, id: str) -> None:
    answers = await asyncio.gather(*(user.client.delete(f"/v1/sandboxes/{id}") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {204}
    assert [call for call, _ in host.calls].count("destroy") == 1
    assert (await _history(user, id))[-2:] == ["delete", "deleted"]


async def test_a_delete_that_fails_is_finished_by_the_next(
    host: HostDouble, user: Team, id: str
) -> None:
    host.fail["destroy"] = HostFailure("The machine does not end")
    assert (await user.client.delete(f"/v1/sandboxes/{id}")).status_code == 502
    del host.fail["destroy"]
    assert (await user.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert await _status(user, id) == "stopped"
    assert host.phases == {}


async def test_a_client_that_leaves_does_not_stop_a_create(
    host: HostDouble, faulty: Server, user: Team
) -> None:
    gate = host.hold("create")
    creating = asyncio.create_task(user.client.post("/v1/sandboxes"))
    await gate.arrived.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    (sandbox,) = (await user.client.get("/v1/sandboxes")).json()
    gate.opened.set()
    await faulty.plane.operations.wait_for_others(SandboxId(sandbox["id"]))
    assert await _status(user, sandbox["id"]) == "running"


async def test_an_exit_is_recorded_at_once_with_its_reason(
    host: HostDouble, user: Team, id: str
) -> None:
    await host.exit(SandboxId(id), "the guest powered off")
    sandbox = (await user.client.get(f"/v1/sandboxes/{id}")).json()
    assert (sandbox["status"], sandbox["reason"]) == ("error", "the guest powered off")
    (event, *_) = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert (event["event"], event["actor"]) == ("lost", "host")


async def test_a_host_that_starts_again_loses_no_event(
    host: HostDouble, user: Team, id: str
) -> None:
    other = str((await user.client.post("/v1/sandboxes")).json()["id"])
    await host.exit(SandboxId(id), "it fell over")
    await host.restart()
    async with asyncio.timeout(20):
        await host.exit(SandboxId(other), "it fell over after the restart")
    sandbox = (await user.client.get(f"/v1/sandboxes/{other}")).json()
    assert sandbox["reason"] == "it fell over after the restart"
