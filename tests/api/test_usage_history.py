"""How long a team's sandboxes ran on each day: exactly what their history says."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from random import Random

import httpx2
import pytest

from support.api_server import FakeClock, Server, Team, serve
from support.host_double import HostDouble
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.model.sandbox import State, Status, shown
from wrenn_sandbox.model.usage import Run
from wrenn_sandbox.settings import Settings

Json = dict[str, object]


@pytest.fixture
async def faulty(settings: Settings, host: HostDouble, clock: FakeClock) -> AsyncIterator[Server]:
    async with serve(settings, host, clock) as server:
        yield server


async def _days(team: Team, **query: str) -> dict[str, Json]:
    """The days on which something ran."""
    answer = await team.client.get("/v1/usage/history", params=query)
    assert answer.status_code == 200, answer.text
    return {each["date"]: each for each in answer.json()["days"] if each["running_sec"]}


async def _create(team: Team, **body: object) -> str:
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def _runs(events: list[Json], size: tuple[int, int], now: datetime) -> Iterator[Run]:
    """When a sandbox ran, by its events alone, oldest first."""
    status, since = Status.PENDING, None
    for each in events:
        status, at = shown(State(str(each["to"])), status), str(each["time"])
        if status is Status.RUNNING and since is None:
            since = datetime.fromisoformat(at)
        if status is not Status.RUNNING and since is not None:
            yield Run(*size, since, datetime.fromisoformat(at))
            since = None
    if since is not None:
        yield Run(*size, since, now)


async def _by_events(team: Team, now: datetime) -> dict[str, Json]:
    """The same as `_days`, of the events of all sandboxes that are still listed."""
    sums: dict[str, list[int]] = {}
    for sandbox in (await team.client.get("/v1/sandboxes")).json():
        events = (await team.client.get(f"/v1/sandboxes/{sandbox['id']}/events")).json()
        for run in _runs(events[::-1], (sandbox["vcpus"], sandbox["memory_mb"]), now):
            for day in run.days():
                found = sums.setdefault(day.day.isoformat(), [0, 0, 0])
                used = (day.running_us, day.vcpu_us, day.memory_mb_us)
                found[:] = [a + b for a, b in zip(found, used, strict=True)]
    names = ("running_sec", "vcpu_sec", "memory_mb_sec")
    return {
        day: {
            "date": day,
            **{name: each / 1_000_000 for name, each in zip(names, sums[day], strict=True)},
        }
        for day in sums
    }


async def test_a_day_counts_what_ran_on_it(user: Team, clock: FakeClock) -> None:
    id = await _create(user, vcpus=2, memory_mb=256)
    clock.advance(12 * 3600 + 60)
    days = await _days(user)
    assert days == {
        "2026-11-01": {
            "date": "2026-11-01",
            "running_sec": 43200.0,
            "vcpu_sec": 86400.0,
            "memory_mb_sec": 43200.0 * 256,
        },
        "2026-11-02": {
            "date": "2026-11-02",
            "running_sec": 60.0,
            "vcpu_sec": 120.0,
            "memory_mb_sec": 60.0 * 256,
        },
    }
    assert await _days(user, **{"from": "2026-11-02"}) == {"2026-11-02": days["2026-11-02"]}
    await user.client.post(f"/v1/sandboxes/{id}/pause")
    clock.advance(3600)
    assert await _days(user) == days


async def test_a_deleted_sandbox_counts_when_nothing_else_is_left_of_it(
    user: Team, faulty: Server, clock: FakeClock
) -> None:
    id = await _create(user)
    clock.advance(10)
    await user.client.delete(f"/v1/sandboxes/{id}")
    clock.advance(2 * 86400)
    await faulty.plane.reconciler.sweep()
    assert (await user.client.get(f"/v1/sandboxes/{id}")).status_code == 404
    days = await _days(user)
    assert [each["running_sec"] for each in days.values()] == [10.0]


async def test_what_never_ran_costs_nothing(user: Team, host: HostDouble, clock: FakeClock) -> None:
    host.fail["create"] = HostFailure("It did not start")
    assert (await user.client.post("/v1/sandboxes")).status_code >= 500
    clock.advance(60)
    assert await _days(user) == {}


async def test_the_answer_has_every_day(user: Team) -> None:
    answer = (await user.client.get("/v1/usage/history")).json()
    assert len(answer["days"]) == 30
    assert (answer["days"][0]["date"], answer["days"][-1]["date"]) == ("2026-10-03", "2026-11-01")
    assert answer["until"] == "2026-11-01T12:00:00Z"
    one = await user.client.get("/v1/usage/history?from=2026-11-01&to=2026-11-01")
    assert len(one.json()["days"]) == 1


@pytest.mark.parametrize(
    "query",
    [
        "from=2026-11-02&to=2026-11-01",
        "from=2025-11-01&to=2026-11-02",
        "from=yesterday",
        "to=2026-02-30",
        "from=0001-01-01&to=9999-12-31",
    ],
)
async def test_days_that_cannot_be_shown(user: Team, query: str) -> None:
    answer = await user.client.get(f"/v1/usage/history?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
async def test_the_ends_of_time_are_days_like_others(user: Team, day: str) -> None:
    assert (await user.client.get(f"/v1/usage/history?to={day}")).status_code == 200


async def test_another_teams_use_is_its_own(user: Team, faulty: Server, clock: FakeClock) -> None:
    other = await faulty.team()
    await _create(other)
    clock.advance(5)
    assert await _days(user) == {}
    assert len(await _days(other)) == 1


async def _step(
    random: Random, team: Team, host: HostDouble, ids: list[str], now: datetime
) -> httpx2.Response:
    id = random.choice(ids)
    match random.randrange(8):
        case 0 | 1:
            return await team.client.post(f"/v1/sandboxes/{id}/pause")
        case 2 | 3:
            return await team.client.post(f"/v1/sandboxes/{id}/resume")
        case 4:
            call = random.choice(["pause", "resume"])
            host.fail[call] = HostFailure("not now")
            answer = await team.client.post(f"/v1/sandboxes/{id}/{call}")
            del host.fail[call]
            return answer
        case 5:
            return await team.client.post(
                f"/v1/sandboxes/{id}/snapshots?overwrite=true", json={"name": id}
            )
        case 6:
            return await team.client.post(f"/v1/sandboxes/{id}/rollback", json={"snapshot": id})
        case _:
            if SandboxId(id) in host.phases and random.random() < 0.3:
                await host.exit(SandboxId(id), "it ended", kept=random.random() < 0.5, at=now)
            return await team.client.get(f"/v1/sandboxes/{id}")


@pytest.mark.parametrize("seed", range(4))
async def test_days_are_exactly_what_the_events_say(
    settings: Settings, host: HostDouble, clock: FakeClock, seed: int
) -> None:
    """Also over a server that ends at any moment, and what its successor finds out."""
    random = Random(seed)
    settings = settings.model_copy(update={"retention_sec": 30 * 86400.0})
    async with serve(settings, host, clock) as server:
        team = await server.team()
        ids = [await _create(team, vcpus=n, memory_mb=128 * n) for n in (1, 2, 3)]
        for _ in range(60):
            await _step(random, team, host, ids, clock.now)
            clock.advance(random.random() * 7000)
        credentials = {"X-API-Key": team.key}
        assert await _days(team) == await _by_events(team, clock.now.astimezone(UTC))
    await host.restart()
    for id in ids:
        if random.random() < 0.5:
            host.phases.pop(SandboxId(id), None)
    clock.advance(3600)
    async with serve(settings, host, clock) as server:
        team.client = server.client(credentials)
        await server.plane.reconciler.sweep()
        clock.advance(100)
        days = await _days(team)
        assert days == await _by_events(team, clock.now.astimezone(UTC))
        assert days
