"""Pausing and deleting at a deadline, with a clock that passes on command."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from support.api_server import FakeClock, Server, Team, eventually, serve
from support.host_double import HostDouble
from wrenn_sandbox.control.service.autopause import AutoPause
from wrenn_sandbox.control.service.deadlines import Deadlines
from wrenn_sandbox.errors import Conflict, HostFailure
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Phase

_DEADLINE = 600
_REASON = "its deadline has come"


@pytest.fixture
async def timed(
    settings: Settings, host: HostDouble, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    """A server that sweeps only when the test does."""

    async def dormant(_: object) -> None:
        await asyncio.Event().wait()

    for timer in (AutoPause, Deadlines):
        monkeypatch.setattr(timer, "run", dormant)
    async with serve(settings, host, clock) as server:
        yield server


@pytest.fixture
async def owner(timed: Server) -> Team:
    return await timed.team()


async def _create(team: Team, **body: object) -> str:
    answer = await team.client.post("/v1/sandboxes", json={"deadline_sec": _DEADLINE, **body})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _status(team: Team, id: str) -> str:
    return str((await team.client.get(f"/v1/sandboxes/{id}")).json()["status"])


async def _history(team: Team, id: str) -> list[tuple[str, str | None, str]]:
    events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    return [(each["event"], each.get("reason"), each["actor"]) for each in reversed(events)]


async def test_a_deadline_pauses_whatever_the_sandbox_does(
    timed: Server, owner: Team, clock: FakeClock
) -> None:
    id, eternal = await _create(owner), await _create(owner, deadline_sec=0)
    body = {"cmd": "c", "background": True}
    assert (await owner.client.post(f"/v1/sandboxes/{id}/exec", json=body)).status_code == 202
    clock.advance(_DEADLINE - 1)
    await owner.client.post(f"/v1/sandboxes/{id}/ping")
    assert (await timed.plane.deadlines.sweep()).total_seconds() == 1
    assert await _status(owner, id) == "running"
    clock.advance(1)
    await timed.plane.deadlines.sweep()
    assert (await _status(owner, id), await _status(owner, eternal)) == ("paused", "running")
    assert (await owner.client.get(f"/v1/sandboxes/{id}")).json()["reason"] == _REASON
    assert (await _history(owner, id))[-2:] == [
        ("pause", _REASON, "deadline"),
        ("paused", None, "deadline"),
    ]


@pytest.mark.parametrize("before", ["running", "paused"])
async def test_a_deadline_deletes_where_that_was_asked_for(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble, before: str
) -> None:
    id = await _create(owner, on_deadline="delete")
    if before == "paused":
        await owner.client.post(f"/v1/sandboxes/{id}/pause")
    clock.advance(_DEADLINE)
    await timed.plane.deadlines.sweep()
    assert await _status(owner, id) == "stopped"
    assert host.phases == {}
    assert (await owner.client.get(f"/v1/sandboxes/{id}")).json()["reason"] == _REASON
    assert (await _history(owner, id))[-2:] == [
        ("delete", _REASON, "deadline"),
        ("deleted", None, "deadline"),
    ]


async def test_a_paused_sandbox_outlives_a_deadline_that_pauses(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble
) -> None:
    id = await _create(owner)
    path = f"/v1/sandboxes/{id}"
    await owner.client.post(f"{path}/snapshots", json={"name": "mine"})
    await owner.client.post(f"{path}/pause")
    clock.advance(2 * _DEADLINE)
    await timed.plane.deadlines.sweep()
    assert await _status(owner, id) == "paused"
    for verb, body in (("resume", {}), ("fork", {}), ("rollback", {"snapshot": "mine"})):
        refused = await owner.client.post(f"{path}/{verb}", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "invalid_state")
        assert "deadline_sec" in refused.json()["error"]["message"]
    assert host.phases == {id: Phase.PAUSED}
    await owner.client.patch(path, json={"deadline_sec": 0})
    assert (await owner.client.post(f"{path}/resume")).status_code == 200
    await timed.plane.deadlines.sweep()
    assert await _status(owner, id) == "running"


async def test_the_shape_and_changes_of_a_deadline(
    timed: Server, owner: Team, clock: FakeClock
) -> None:
    id = await _create(owner)
    path = f"/v1/sandboxes/{id}"
    made = (await owner.client.get(path)).json()
    deadline = clock.now + timedelta(seconds=_DEADLINE)
    assert datetime.fromisoformat(made["deadline_at"]) == deadline
    assert made["on_deadline"] == "pause"
    clock.advance(60)
    kept = (await owner.client.patch(path, json={"on_deadline": "delete"})).json()
    assert (kept["deadline_at"], kept["on_deadline"]) == (made["deadline_at"], "delete")
    later = (await owner.client.patch(path, json={"deadline_sec": _DEADLINE})).json()
    assert datetime.fromisoformat(later["deadline_at"]) == deadline + timedelta(seconds=60)
    clock.advance(_DEADLINE - 1)
    await timed.plane.deadlines.sweep()
    assert await _status(owner, id) == "running"
    none = (await owner.client.patch(path, json={"deadline_sec": 0, "on_deadline": None})).json()
    assert (none.get("deadline_at"), none["on_deadline"]) == (None, "delete")
    clock.advance(100 * _DEADLINE)
    await timed.plane.deadlines.sweep()
    assert await _status(owner, id) == "running"


_BAD: list[tuple[str, object]] = [
    ("deadline_sec", -1),
    ("deadline_sec", 366 * 24 * 3600),
    ("deadline_sec", "60"),
    ("on_deadline", "explode"),
    ("on_deadline", 1),
]


async def test_deadlines_that_are_not_acceptable(timed: Server, owner: Team) -> None:
    id = await _create(owner)
    for field, value in _BAD:
        for method, path in (("POST", "/v1/sandboxes"), ("PATCH", f"/v1/sandboxes/{id}")):
            answer = await owner.client.request(method, path, json={field: value})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith(field)


async def test_the_history_says_once_that_a_deadline_is_near(
    timed: Server, owner: Team, clock: FakeClock
) -> None:
    id = await _create(owner, on_deadline="delete")
    clock.advance(_DEADLINE - 61)
    assert (await timed.plane.deadlines.sweep()).total_seconds() == 1
    assert "deadline_near" not in [each for each, _, _ in await _history(owner, id)]
    for _ in range(2):
        clock.advance(1)
        await timed.plane.deadlines.sweep()
    near = ("deadline_near", "delete at 2026-11-01T12:10:00Z", "deadline")
    assert (await _history(owner, id)).count(near) == 1
    await owner.client.patch(f"/v1/sandboxes/{id}", json={"deadline_sec": 30})
    await owner.client.post(f"/v1/sandboxes/{id}/pause")
    await timed.plane.deadlines.sweep()
    history = [each for each, _, _ in await _history(owner, id)]
    assert history.count("deadline_near") == 2
    assert history[-1] == "deadline_near"
    assert await _status(owner, id) == "paused"


async def test_a_deadline_that_was_missed_is_acted_on_at_the_next_start(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with serve(settings, host, clock) as server:
        team = await server.team()
        id = await _create(team, on_deadline="delete")
    clock.advance(2 * _DEADLINE)
    async with serve(settings, host, clock) as server:
        await host.called["destroy"].wait()
        await server.plane.operations.wait_for_others(SandboxId(id))
        team.client = server.client({"X-API-Key": team.key})
        assert await _status(team, id) == "stopped"
        assert "deadline_near" not in [each for each, _, _ in await _history(team, id)]


async def test_a_change_that_comes_just_then_wins(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble
) -> None:
    """The sandbox got another deadline after the sweep had read the old one."""
    paused, deleted = await _create(owner), await _create(owner, on_deadline="delete")
    clock.advance(_DEADLINE)
    due = clock.now
    for id in (paused, deleted):
        await owner.client.patch(f"/v1/sandboxes/{id}", json={"deadline_sec": 0})
    with pytest.raises(Exception, match="another deadline"):
        await timed.plane.lifecycle.pause(SandboxId(paused), "deadline", _REASON, due)
    with pytest.raises(Exception, match="another deadline"):
        await timed.plane.lifecycle.delete(SandboxId(deleted), "deadline", _REASON, due)
    assert [await _status(owner, id) for id in (paused, deleted)] == ["running"] * 2
    assert {call for call, _ in host.calls} & {"pause", "destroy"} == set()


async def test_a_pause_at_the_deadline_that_fails_is_repeated(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble
) -> None:
    id = await _create(owner)
    host.fail["pause"] = HostFailure("The disk is full")
    clock.advance(_DEADLINE)
    for _ in range(2):
        assert (await timed.plane.deadlines.sweep()).total_seconds() <= 5
    assert [call for call, _ in host.calls].count("pause") == 1
    assert await _status(owner, id) == "running"
    del host.fail["pause"]
    clock.advance(5)
    await timed.plane.deadlines.sweep()
    assert await _status(owner, id) == "paused"


async def test_a_pause_that_takes_long_holds_up_no_other_deadline(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    gate = host.hold("pause")
    async with serve(settings, host, clock) as server:
        await _create(await server.team())
        other = await _create(await server.team(), on_deadline="delete", deadline_sec=1200)
        wakeup = server.plane._context.wakeups.deadlines
        clock.advance(_DEADLINE)
        wakeup.set()
        await gate.arrived.wait()
        clock.advance(_DEADLINE)
        wakeup.set()
        await eventually(lambda: ("destroy", other) in host.calls)
        assert [call for call, _ in host.calls].count("pause") == 1
        gate.opened.set()


async def test_a_caller_deletes_what_a_moved_deadline_would_have(
    timed: Server, owner: Team
) -> None:
    """Whoever deletes joins a deletion under way: here one that finds another deadline."""
    id = SandboxId(await _create(owner, on_deadline="delete"))
    late, deleted = await asyncio.gather(
        timed.plane.lifecycle.delete(id, "deadline", _REASON, datetime.now(UTC)),
        timed.plane.lifecycle.delete(id),
        return_exceptions=True,
    )
    assert isinstance(late, Conflict)
    assert deleted is None
    assert await _status(owner, id) == "stopped"
    assert (await _history(owner, id))[-1] == ("deleted", None, "user")


async def test_a_deadline_near_ends_no_silence(
    timed: Server, owner: Team, clock: FakeClock
) -> None:
    id = SandboxId(await _create(owner))
    silences = timed.plane.store.silences
    await silences.begin(id, "guest not responding", "health", clock.now)
    clock.advance(_DEADLINE - 30)
    await timed.plane.deadlines.sweep()
    assert (await _history(owner, id))[-1][0] == "deadline_near"
    assert list(await silences.all()) == [id]
