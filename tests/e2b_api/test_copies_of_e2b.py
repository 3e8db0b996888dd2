"""Snapshots and forks as E2B's clients ask for them."""

import re
from datetime import timedelta

import pytest
from e2b.api.client.models import SandboxForkResult, SnapshotInfo
from sqlalchemy import select

from support.api_server import FakeClock, Server, Team, serve
from support.e2b import created, detail, listed
from support.host_double import HostDouble
from wrenn_sandbox.control.store.tables import idempotency_keys
from wrenn_sandbox.errors import NoCapacity
from wrenn_sandbox.settings import Settings


async def _snapshot(team: Team, id: str, **body: object) -> SnapshotInfo:
    answer = await team.client.post(f"/sandboxes/{id}/snapshots", json=body)
    assert answer.status_code == 201, answer.text
    return SnapshotInfo.from_dict(answer.json())


async def _snapshots(team: Team, **query: str) -> list[str]:
    answer = await team.client.get("/snapshots", params=query)
    assert answer.status_code == 200, answer.text
    return [SnapshotInfo.from_dict(each).snapshot_id for each in answer.json()]


async def test_a_snapshot_of_e2b_leaves_its_sandbox_running(faulty: Server, user: Team) -> None:
    id = await created(user)
    made = await _snapshot(user, id, name="mine")
    assert made.names == [f"{user.team_id}/mine:default"]
    assert (await detail(user, id)).state.value == "running"
    for template in (made.snapshot_id, "mine:default", *made.names):
        assert (await detail(user, await created(user, templateID=template))).alias == "mine"
    again = await _snapshot(user, id, name=made.names[0])
    assert again == made
    assert await _snapshots(user) == ["mine"]


async def test_snapshots_are_listed_by_sandbox_and_name(faulty: Server, user: Team) -> None:
    first, second = await created(user), await created(user)
    unnamed = (await _snapshot(user, first)).snapshot_id
    for id, name in ((first, "a"), (second, "b"), (second, "c")):
        await _snapshot(user, id, name=name)
    assert set(await _snapshots(user)) == {unnamed, "a", "b", "c"}
    assert set(await _snapshots(user, sandboxID=second)) == {"b", "c"}
    assert await _snapshots(user, name=f"{user.team_id}/b:default") == ["b"]
    assert await _snapshots(await faulty.team()) == []
    seen: list[str] = []
    query = {"limit": "3"}
    while True:
        answer = await user.client.get("/snapshots", params=query)
        seen += [each["snapshotID"] for each in answer.json()]
        if "x-next-token" not in answer.headers:
            break
        query["nextToken"] = answer.headers["x-next-token"]
    assert sorted(seen) == sorted([unnamed, "a", "b", "c"])


@pytest.mark.parametrize("form", ["{name}", "{name}%3Adefault", "{team}%2F{name}%3Adefault"])
async def test_a_snapshot_is_deleted_as_a_template(faulty: Server, user: Team, form: str) -> None:
    await _snapshot(user, await created(user), name="mine")
    path = "/templates/" + form.format(team=user.team_id, name="mine")
    assert (await user.client.delete(path)).status_code == 204
    assert (await user.client.delete(path)).status_code == 404
    assert (await user.client.delete("/templates/minimal")).status_code == 403
    assert (await user.client.delete("/templates/mine%253Adefault")).status_code == 404


async def test_forks_of_e2b_have_timeouts_of_their_own(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        id = await created(team, timeout=1000, autoPause=True, metadata={"a": "1"})
        clock.advance(1000)
        await server.plane.deadlines.sweep()
        answer = await team.client.post(f"/sandboxes/{id}/fork", json={"count": 2, "timeout": 70})
        assert answer.status_code == 201, answer.text
        forks = [SandboxForkResult.from_dict(each) for each in answer.json()]
        for each in forks:
            shown = await detail(team, each.sandbox.sandbox_id)  # type: ignore[union-attr]
            assert shown.end_at == clock.now + timedelta(seconds=70)
            assert (shown.metadata, shown.state.value) == ({"a": "1"}, "running")
        assert (await detail(team, id)).state.value == "paused"


async def test_copies_of_e2b_are_answered_again_when_their_source_is_gone(
    faulty: Server, user: Team
) -> None:
    id = await created(user, network={"allowPublicTraffic": False})
    asked: tuple[tuple[str, dict[str, object]], ...] = (
        (f"/sandboxes/{id}/snapshots", {"name": "mine"}),
        (f"/sandboxes/{id}/fork", {"count": 2, "timeout": 900}),
        ("/v2/sandboxes", {"templateID": "mine"}),
    )
    headers = {"Idempotency-Key": "0b5b"}
    first = [await user.client.post(path, json=body, headers=headers) for path, body in asked]
    tokens = set(re.findall(r'AccessToken":"([0-9a-f]{64})"', "".join(each.text for each in first)))
    assert len(tokens) == 5, "two of each fork, and one of what has public ports"
    await user.client.delete(f"/sandboxes/{id}")
    assert (await user.client.delete("/templates/mine")).status_code == 204
    for (path, body), before in zip(asked, first, strict=True):
        answer = await user.client.post(path, json=body, headers=headers)
        assert (answer.status_code, answer.text) == (201, before.text)
        assert answer.headers["idempotency-replayed"] == "true"
    async with faulty.plane.store._database.read() as connection:
        kept = str((await connection.execute(select(idempotency_keys.c.answer))).all())
    assert "envdAccessToken" in kept
    assert not any(each in kept for each in tokens)


async def test_a_fork_of_e2b_that_fails_has_its_error(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await created(user)
    host.fail["create"] = NoCapacity("The host is full")
    answer = await user.client.post(f"/sandboxes/{id}/fork")
    error = {"code": 503, "message": "The host is full", "error_code": "no_capacity"}
    assert (answer.status_code, answer.json()) == (201, [{"error": error}])
    assert await listed(user) == [id]
