"""Templates made from sandboxes, on a host that fails on command."""

import asyncio

import httpx2
import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.errors import HostFailure

pytestmark = pytest.mark.slow


@pytest.fixture
async def id(user: Team) -> str:
    return await _create(user)


async def _create(team: Team, **body: object) -> str:
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _snapshot(team: Team, id: str, query: str = "", **body: object) -> httpx2.Response:
    return await team.client.post(f"/v1/snapshots{query}", json={"sandbox_id": id, **body})


async def _names(team: Team, query: str = "") -> list[str]:
    return [each["name"] for each in (await team.client.get(f"/v1/snapshots{query}")).json()]


async def test_a_sandbox_becomes_a_template(host: HostDouble, user: Team, id: str) -> None:
    made = await _snapshot(user, id, name="mine")
    assert made.status_code == 201
    template = made.json()
    assert (template["name"], template["type"]) == ("mine", "snapshot")
    assert (template["vcpus"], template["memory_mb"], template["size_bytes"]) == (2, 256, 8192)
    sandbox = (await user.client.get(f"/v1/sandboxes/{id}")).json()
    assert (sandbox["status"], sandbox["reason"]) == ("stopped", "snapshotted")
    assert host.phases == {}
    copy = await user.client.post("/v1/sandboxes", json={"template": "mine", "vcpus": 1})
    assert (copy.json()["vcpus"], copy.json()["memory_mb"]) == (2, 256)


async def test_lists_and_filters(user: Team, id: str) -> None:
    assert await _names(user) == ["minimal"]
    await _snapshot(user, id, name="mine")
    assert await _names(user) == ["mine", "minimal"]
    assert await _names(user, "?type=base") == ["minimal"]
    assert await _names(user, "?type=snapshot") == ["mine"]
    page = await user.client.get("/v1/snapshots?limit=1")
    cursor = page.headers["x-next-cursor"]
    assert await _names(user, f"?limit=1&cursor={cursor}") == ["minimal"]
    for query in ("?type=other", "?type=", "?limit=-1", "?cursor=x"):
        assert (await user.client.get(f"/v1/snapshots{query}")).status_code == 400


async def test_snapshots_without_a_name_get_one(user: Team, id: str) -> None:
    first = (await _snapshot(user, id)).json()["name"]
    second = (await _snapshot(user, await _create(user), name=None)).json()["name"]
    assert first != second
    for name in (first, second):
        assert name.startswith("template-")
        assert len(name) == len("template-") + 8


async def test_names_that_are_not_acceptable(user: Team, id: str) -> None:
    for name in ("", "-x", ".x", "a b", "x" * 65, "ü", "a\n", "nul\0", 1):
        answer = await _snapshot(user, id, name=name)
        assert answer.status_code == 400
        assert "name" in answer.json()["error"]["message"]


async def test_names_that_are_taken(host: HostDouble, user: Team, id: str) -> None:
    await _snapshot(user, id, name="mine")
    (old,) = host.images
    other = await _create(user)
    for name, query in (("mine", ""), ("minimal", ""), ("minimal", "?overwrite=true")):
        answer = await _snapshot(user, other, query, name=name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "already_exists")
    assert (await _snapshot(user, other, "?overwrite=false", name="mine")).status_code == 400
    assert (await user.client.get(f"/v1/sandboxes/{other}")).json()["status"] == "running"
    replaced = await _snapshot(user, other, "?overwrite=true", name="mine")
    assert replaced.status_code == 201
    assert await _names(user, "?type=snapshot") == ["mine"]
    assert old not in host.images
    assert len(host.images) == 1


async def test_two_teams_use_one_name(host: HostDouble, faulty: Server, user: Team) -> None:
    stranger = await faulty.team()
    for team in (user, stranger):
        assert (await _snapshot(team, await _create(team), name="same")).status_code == 201
    assert (await user.client.delete("/v1/snapshots/same")).status_code == 204
    assert await _names(stranger, "?type=snapshot") == ["same"]
    assert len(host.images) == 1


async def test_the_source_must_run(user: Team, id: str) -> None:
    await user.client.post(f"/v1/sandboxes/{id}/pause")
    answer = await _snapshot(user, id)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    assert (await _snapshot(user, "sb-" + "a" * 20)).status_code == 404
    assert (await _snapshot(user, "nul\0")).status_code == 404


async def test_a_failure_leaves_sandbox_and_old_template(
    host: HostDouble, user: Team, id: str
) -> None:
    await _snapshot(user, id, name="mine")
    images = dict(host.images)
    other = await _create(user)
    host.fail["snapshot"] = HostFailure("The disk is full")
    answer = await _snapshot(user, other, "?overwrite=true", name="mine")
    assert answer.status_code == 502
    assert (await user.client.get(f"/v1/sandboxes/{other}")).json()["status"] == "running"
    assert host.images == images
    del host.fail["snapshot"]
    assert (await _snapshot(user, other, "?overwrite=true", name="mine")).status_code == 201


async def test_one_of_two_with_the_same_name_wins(user: Team, id: str) -> None:
    other = await _create(user)
    answers = await asyncio.gather(
        _snapshot(user, id, name="mine"), _snapshot(user, other, name="mine")
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409]
    statuses = {
        (await user.client.get(f"/v1/sandboxes/{each}")).json()["status"] for each in (id, other)
    }
    assert statuses == {"running", "stopped"}


async def test_delete_during_a_snapshot(
    host: HostDouble, faulty: Server, user: Team, id: str
) -> None:
    gate = host.hold("snapshot")
    making = faulty.start(_snapshot(user, id, name="mine"))
    await gate.arrived.wait()
    deleting = faulty.start(user.client.delete(f"/v1/sandboxes/{id}"))
    await host.called["destroy"].wait()
    gate.opened.set()
    assert (await making).status_code in (404, 409)
    assert (await deleting).status_code == 204
    assert await _names(user) == ["minimal"]
    assert host.images == {}
    assert await faulty.plane.store.snapshots.intents() == []


async def test_what_can_be_deleted(user: Team, id: str) -> None:
    await _snapshot(user, id, name="mine")
    running = await _create(user, template="mine")
    assert (await user.client.delete("/v1/snapshots/mine")).status_code == 204
    assert (await user.client.get(f"/v1/sandboxes/{running}")).json()["status"] == "running"
    for name, status, code in (
        ("mine", 404, "not_found"),
        ("nul%00", 404, "not_found"),
        ("minimal", 403, "forbidden"),
    ):
        answer = await user.client.delete(f"/v1/snapshots/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_name_and_what_counts_are_a_teams_own(faulty: Server, user: Team) -> None:
    for team in (user, await faulty.team()):
        id = (await team.client.post("/v1/sandboxes")).json()["id"]
        body = {"sandbox_id": id, "name": "the-same"}
        assert (await team.client.post("/v1/snapshots", json=body)).status_code == 201
        used = (await team.client.get("/v1/usage")).json()["used"]
        assert (used["snapshots"], used["api_keys"]) == (1, 1)
