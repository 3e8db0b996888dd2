"""What a team may have: each limit, with many requests at once, on both databases."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import httpx2
import pytest
from sqlalchemy import select

from support.api_server import Server, Team, serve
from support.host_double import HostDouble
from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.control.store.administration import administration
from wrenn_sandbox.control.store.database import Database
from wrenn_sandbox.control.store.tables import teams
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.quota import QuotaOverride
from wrenn_sandbox.settings import Settings

pytestmark = pytest.mark.slow

Limited = Callable[..., AbstractAsyncContextManager[tuple[Server, Team]]]


@pytest.fixture
def limited(settings: Settings, host: HostDouble) -> Limited:
    """A server whose teams have these limits, and one of them."""

    @asynccontextmanager
    async def start(**quotas: int) -> AsyncIterator[tuple[Server, Team]]:
        values = {f"quota_{name}": value for name, value in quotas.items()}
        async with serve(settings.model_copy(update=values), host) as server:
            yield server, await server.team()

    return start


async def _create(team: Team, **body: object) -> httpx2.Response:
    return await team.client.post("/v1/sandboxes", json=body)


async def _created(team: Team, **body: object) -> str:
    answer = await _create(team, **body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _do(team: Team, id: str, verb: str) -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/{verb}")


async def _used(team: Team) -> dict[str, int]:
    answer = await team.client.get("/v1/usage")
    assert answer.status_code == 200, answer.text
    used: dict[str, int] = answer.json()["used"]
    return used


def _is_over(answer: httpx2.Response, limit: str) -> bool:
    error = answer.json().get("error", {})
    return (answer.status_code, error.get("code"), error.get("limit")) == (
        429,
        "quota_exceeded",
        limit,
    )


async def test_many_requests_of_one_team_leave_connections_to_the_others(
    faulty: Server, user: Team
) -> None:
    other, database = await faulty.team(), Database(faulty.settings.sql_url)
    row = select(teams.c.id).where(teams.c.id == user.team_id).with_for_update()
    async with database.write() as connection:
        await connection.execute(row)
        creating = [faulty.start(_create(user)) for _ in range(40)]
        async with asyncio.timeout(5):
            for _ in range(40):
                assert (await other.client.get("/v1/sandboxes")).status_code == 200
    await database.close()
    assert {(await each).status_code for each in creating} == {201}


@pytest.mark.parametrize(
    ("limit", "value"), [("running", 3), ("vcpus", 6), ("memory_mb", 3 * 256), ("sandboxes", 3)]
)
async def test_creates_at_once_never_pass_a_limit(
    limited: Limited, host: HostDouble, limit: str, value: int
) -> None:
    async with limited(**{limit: value}) as (_, team):
        answers = await asyncio.gather(*(_create(team, vcpus=2, memory_mb=256) for _ in range(10)))
        assert sum(each.status_code == 201 for each in answers) == 3
        refused = [each for each in answers if each.status_code != 201]
        assert all(_is_over(each, limit) for each in refused)
        assert f"at most {value} " in refused[0].json()["error"]["message"]
        assert "retry-after" not in refused[0].headers
        assert len(host.phases) == 3
        assert len((await team.client.get("/v1/sandboxes")).json()) == 3


@pytest.mark.parametrize(("limit", "value"), [("running", 3), ("vcpus", 3), ("memory_mb", 1536)])
async def test_resumes_at_once_never_pass_a_limit(
    limited: Limited, host: HostDouble, limit: str, value: int
) -> None:
    async with limited(**{limit: value}) as (_, team):
        ids = []
        for _ in range(8):
            ids.append(await _created(team))
            assert (await _do(team, ids[-1], "pause")).status_code == 200
        answers = await asyncio.gather(
            *(_do(team, id, "resume") for id in ids), *(_create(team) for _ in range(4))
        )
        done = [each for each in answers if each.status_code in (200, 201)]
        assert len(done) == 3
        assert all(_is_over(each, limit) for each in answers if each not in done)
        used = await _used(team)
        assert (used["running"], used["vcpus"], used["memory_mb"]) == (3, 3, 1536)
        refused = [id for id, answer in zip(ids, answers, strict=False) if answer not in done]
        events = (await team.client.get(f"/v1/sandboxes/{refused[0]}/events")).json()
        assert events[0]["event"] == "paused", "a refusal leaves no trace"


async def _give(server: Server, team: Team, quota: QuotaOverride) -> None:
    async with administration(server.settings.sql_url, "tester") as admin:
        await admin.set_quota(TeamId(team.team_id), quota, utc_now())


async def test_who_is_over_a_limit_can_pause_and_delete(limited: Limited) -> None:
    async with limited() as (server, team):
        first, second = await _created(team), await _created(team)
        await _give(server, team, QuotaOverride(running=1, sandboxes=1, disk_mb=1))
        assert _is_over(await _create(team), "running")
        assert (await _do(team, first, "pause")).status_code == 200
        assert _is_over(await _do(team, first, "resume"), "running")
        assert (await team.client.delete(f"/v1/sandboxes/{second}")).status_code == 204
        assert _is_over(await _create(team), "sandboxes")
        assert (await _do(team, first, "resume")).status_code == 200


async def test_what_is_in_flight_counts_and_what_failed_does_not(
    limited: Limited, host: HostDouble
) -> None:
    async with limited(running=1) as (server, team):
        gate = host.hold("create")
        creating = server.start(_create(team))
        await gate.arrived.wait()
        assert _is_over(await _create(team), "running")
        host.fail["create"] = HostFailure("It did not start")
        gate.opened.set()
        assert (await creating).status_code == 502
        del host.fail["create"]
        id = await _created(team)
        gate = host.hold("pause")
        pausing = server.start(_do(team, id, "pause"))
        await gate.arrived.wait()
        refused = await _create(team)
        assert _is_over(refused, "running")
        assert refused.headers["retry-after"] == "2", "it is being given back"
        gate.opened.set()
        assert (await pausing).status_code == 200
        assert (await _create(team)).status_code == 201


async def test_a_state_that_does_not_allow_it_comes_before_a_limit(limited: Limited) -> None:
    async with limited(running=1, snapshots=1) as (_, team):
        id = await _created(team)
        assert (await _do(team, id, "resume")).json()["error"]["code"] == "invalid_state"


async def test_limits_are_of_one_team_alone(limited: Limited) -> None:
    async with limited(running=1) as (server, team):
        other, third = await server.team(), await server.team()
        for each in (team, other):
            await _created(each)
            assert _is_over(await _create(each), "running")
        await _give(server, third, QuotaOverride(running=0))
        await asyncio.gather(*(_created(third) for _ in range(4)))
        await _give(server, third, QuotaOverride())
        assert _is_over(await _create(third), "running")


async def _snapshot(team: Team, id: str, name: str, query: str = "") -> httpx2.Response:
    return await team.client.post(f"/v1/snapshots{query}", json={"sandbox_id": id, "name": name})


async def test_snapshots_at_once_never_pass_the_limit(limited: Limited, host: HostDouble) -> None:
    async with limited(snapshots=2) as (_, team):
        ids = [await _created(team) for _ in range(6)]
        answers = await asyncio.gather(*(_snapshot(team, id, f"of-{id}") for id in ids))
        made = [id for id, each in zip(ids, answers, strict=True) if each.status_code == 201]
        assert len(made) == 2
        assert all(_is_over(each, "snapshots") for each in answers if each.status_code != 201)
        left = [id for id in ids if id not in made]
        assert host.phases.keys() == set(left), "a refused one runs on"
        for id in left:
            events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
            assert events[0]["event"] == "started"
        again = await _snapshot(team, left[0], f"of-{made[0]}", "?overwrite=true")
        assert again.status_code == 201, "overwriting takes no more room"
        taken = await _snapshot(team, left[1], f"of-{made[0]}")
        assert taken.json()["error"]["code"] == "already_exists"
        assert (await team.client.delete(f"/v1/snapshots/of-{made[0]}")).status_code == 204
        assert (await _snapshot(team, left[1], "another")).status_code == 201


async def test_disk_is_what_the_host_reports(
    limited: Limited, host: HostDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limited(disk_mb=600) as (server, team):
        running, paused = await _created(team), await _created(team, memory_mb=128)
        assert (await _do(team, paused, "pause")).status_code == 200
        for id in (running, paused):
            host.disk_bytes[id] = 150 << 20
        await server.plane.reconciler.sweep()
        assert (await _used(team))["disk_bytes"] == 300 << 20
        shown = (await team.client.get(f"/v1/sandboxes/{paused}")).json()
        assert shown["disk_bytes"] == 150 << 20

        refused = await _snapshot(team, running, "big")
        assert _is_over(refused, "disk_mb"), "its memory has to be stored too"
        assert host.phases[SandboxId(running)] == "running"
        host.disk_bytes[paused] = 900 << 20
        await server.plane.reconciler.sweep()
        assert _is_over(await _create(team), "disk_mb")
        assert _is_over(await _do(team, paused, "resume"), "disk_mb")
        assert (await _do(team, running, "pause")).status_code == 200
        assert (await team.client.delete(f"/v1/sandboxes/{paused}")).status_code == 204
        assert (await _do(team, running, "resume")).status_code == 200


async def test_a_snapshot_counts_with_its_size_and_a_replaced_one_once(
    limited: Limited, host: HostDouble
) -> None:
    async with limited(disk_mb=129) as (_, team):
        host.image_bytes = 100 << 20
        assert (
            await _snapshot(team, await _created(team, memory_mb=128), "one")
        ).status_code == 201
        assert (await _used(team))["disk_bytes"] == 100 << 20
        id = await _created(team, memory_mb=128)
        assert _is_over(await _snapshot(team, id, "two"), "disk_mb")
        assert (await _snapshot(team, id, "one", "?overwrite=true")).status_code == 201
        assert (await _used(team))["disk_bytes"] == 100 << 20


async def test_a_snapshot_under_way_counts_with_all_that_its_sandbox_has(
    limited: Limited, host: HostDouble
) -> None:
    async with limited(disk_mb=250, snapshots=1) as (server, team):
        id = await _created(team, memory_mb=128)
        host.disk_bytes[id] = 60 << 20
        await server.plane.reconciler.sweep()
        gate = host.hold("checkpoint")
        making = server.start(_do(team, id, "snapshots"))
        await gate.arrived.wait()
        assert await _used(team) | {"snapshots": 1, "disk_bytes": 248 << 20} == await _used(team)
        assert _is_over(await _do(team, id, "fork"), "disk_mb")
        gate.opened.set()
        assert (await making).status_code == 201
        assert (await _used(team))["disk_bytes"] == (60 << 20) + host.image_bytes
        assert (await _do(team, id, "fork")).status_code == 201
        assert _is_over(await _do(team, id, "snapshots"), "snapshots")
        assert (await _used(team))["disk_bytes"] == (60 << 20) + host.image_bytes


async def test_forks_never_pass_a_limit(limited: Limited, host: HostDouble) -> None:
    async with limited(running=4) as (_, team):
        id = await _created(team)
        answers = await asyncio.gather(
            *(
                team.client.post(f"/v1/sandboxes/{id}/fork", json={"count": count})
                for count in (5, 2)
            )
        )
        forks = [each for answer in answers for each in answer.json()]
        errors = [each["error"] for each in forks if "error" in each]
        assert len(errors) == 4
        assert {(each["code"], each["limit"]) for each in errors} == {("quota_exceeded", "running")}
        assert len(host.phases) == 4
        assert (await _used(team))["running"] == 4


async def test_a_rollback_counts_as_a_resume_where_the_sandbox_was_paused(
    limited: Limited, host: HostDouble
) -> None:
    async with limited(running=1) as (server, team):
        id = await _created(team)
        await team.client.post(f"/v1/sandboxes/{id}/snapshots", json={"name": "mine"})
        path, body = f"/v1/sandboxes/{id}/rollback", {"snapshot": "mine"}
        assert (await team.client.post(path, json=body)).status_code == 200
        assert (await _do(team, id, "pause")).status_code == 200
        other = await _created(team)
        refused = await team.client.post(path, json=body)
        assert _is_over(refused, "running")
        assert host.phases[SandboxId(id)] == "paused"
        events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
        assert events[0]["event"] == "paused", "a refusal leaves no trace"
        assert await server.plane.store.rollbacks.all() == []
        await _give(server, team, QuotaOverride(running=2))
        gate = host.hold("rollback")
        rolling = server.start(team.client.post(path, json=body))
        await gate.arrived.wait()
        assert (await _used(team))["running"] == 2, "it counts on its way"
        gate.opened.set()
        assert (await rolling).status_code == 200
        await _give(server, team, QuotaOverride(running=1))
        again = await team.client.post(path, json=body)
        assert again.status_code == 200, "one that runs takes no more"
        assert (await team.client.delete(f"/v1/sandboxes/{other}")).status_code == 204


async def test_small_changes_of_disk_are_not_written_down(
    limited: Limited, host: HostDouble
) -> None:
    async with limited() as (server, team):
        id = await _created(team)
        seen = []
        for size in (5 << 20, (5 << 20) + 4096, 9 << 20, 0):
            host.disk_bytes[id] = size
            await server.plane.reconciler.sweep()
            seen.append((await _used(team))["disk_bytes"])
        assert seen == [5 << 20, 5 << 20, 9 << 20, 0]


async def test_api_keys_at_once_never_pass_the_limit(limited: Limited) -> None:
    async with limited(api_keys=4) as (_, team):
        answers = await asyncio.gather(
            *(team.client.post("/v1/api-keys", json={}, headers=team.bearer) for _ in range(8))
        )
        assert sum(each.status_code == 201 for each in answers) == 3, "and the first one"
        assert all(_is_over(each, "api_keys") for each in answers if each.status_code != 201)


async def test_usage_shows_limits_and_use(limited: Limited) -> None:
    async with limited(running=0, disk_mb=10) as (server, team):
        await _created(team, vcpus=2, memory_mb=256)
        answer = (await team.client.get("/v1/usage")).json()
        assert answer["limits"] == {
            "running": None,
            "vcpus": None,
            "memory_mb": None,
            "sandboxes": 1000,
            "snapshots": 100,
            "disk_bytes": 10 << 20,
            "api_keys": 100,
        }
        assert answer["used"] == {
            "running": 1,
            "vcpus": 2,
            "memory_mb": 256,
            "sandboxes": 1,
            "snapshots": 0,
            "disk_bytes": 0,
            "api_keys": 1,
        }
        stranger = replace(team, client=server.client())
        assert (await stranger.client.get("/v1/usage")).status_code == 401
