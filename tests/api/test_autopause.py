"""Pausing after a time without activity, with a clock that passes on command."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.api_server import FakeClock, Server, Team, make_settings, serve
from support.host_double import HostDouble
from wrenn_sandbox.control.service.autopause import AutoPause
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import SandboxId, TeamId

_TIMEOUT = 60


@pytest.fixture
async def timed(
    tmp_path: Path, host: HostDouble, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    """A server that sweeps only when the test does."""

    async def dormant(_: AutoPause) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(AutoPause, "run", dormant)
    async with serve(make_settings(tmp_path, None), host, clock) as server:
        yield server


@pytest.fixture
async def owner(timed: Server) -> Team:
    return await timed.team()


async def _create(team: Team, timeout_sec: int = _TIMEOUT) -> str:
    body = {"timeout_sec": timeout_sec}
    return str((await team.client.post("/v1/sandboxes", json=body)).json()["id"])


async def _status(team: Team, id: str) -> str:
    return str((await team.client.get(f"/v1/sandboxes/{id}")).json()["status"])


async def test_an_idle_sandbox_is_paused(timed: Server, owner: Team, clock: FakeClock) -> None:
    idle, eternal = await _create(owner), await _create(owner, 0)
    clock.advance(_TIMEOUT - 1)
    assert (await timed.plane.autopause.sweep()).total_seconds() == 1
    assert await _status(owner, idle) == "running"
    clock.advance(1)
    await timed.plane.autopause.sweep()
    assert await _status(owner, idle) == "paused"
    assert await _status(owner, eternal) == "running"
    (event, *_) = (await owner.client.get(f"/v1/sandboxes/{idle}/events")).json()
    assert (event["event"], event["actor"]) == ("paused", "auto")


@pytest.mark.parametrize("activity", ["ping", "exec"])
async def test_activity_puts_the_automatic_pause_off(
    timed: Server, owner: Team, clock: FakeClock, activity: str
) -> None:
    id = await _create(owner)
    clock.advance(_TIMEOUT - 1)
    await owner.client.post(f"/v1/sandboxes/{id}/{activity}", json={"cmd": "true"})
    clock.advance(_TIMEOUT - 1)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "running"
    clock.advance(1)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "paused"
    sandbox = await timed.plane.store.all_sandboxes.get(SandboxId(id))
    assert sandbox is not None
    assert sandbox.last_active_at is not None
    assert (clock.now - sandbox.last_active_at).total_seconds() == _TIMEOUT


async def test_a_running_command_is_activity(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble
) -> None:
    id = await _create(owner)
    gate = host.hold("exec")
    running = timed.start(owner.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "c"}))
    await gate.arrived.wait()
    clock.advance(10 * _TIMEOUT)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "running"
    gate.opened.set()
    assert (await running).status_code == 200
    clock.advance(_TIMEOUT - 1)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "running"
    clock.advance(1)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "paused"


async def test_a_command_in_the_background_is_activity(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble
) -> None:
    id = await _create(owner)
    body = {"cmd": "c", "background": True}
    assert (await owner.client.post(f"/v1/sandboxes/{id}/exec", json=body)).status_code == 202
    for _ in range(3):
        clock.advance(10 * _TIMEOUT)
        await timed.plane.autopause.sweep()
        assert await _status(owner, id) == "running"
    host.running.clear()
    clock.advance(9)
    assert (await timed.plane.autopause.sweep()).total_seconds() == 1
    clock.advance(1)
    await timed.plane.autopause.sweep()
    clock.advance(_TIMEOUT - 1)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "running"
    clock.advance(1)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "paused"


async def test_a_command_that_begins_just_then_wins(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble
) -> None:
    id = SandboxId(await _create(owner))
    with timed.plane.activity.using(id, TeamId(owner.team_id)):
        clock.advance(_TIMEOUT)
        with pytest.raises(Exception, match="in use again"):
            await timed.plane.lifecycle.pause(id, "auto")
    assert await _status(owner, id) == "running"
    assert ("pause", id) not in host.calls


async def test_who_may_not_use_a_sandbox_does_not_keep_it_awake(
    timed: Server, owner: Team, clock: FakeClock
) -> None:
    id = SandboxId(await _create(owner))
    other = await timed.team()
    with timed.plane.activity.using(id, TeamId(other.team_id)):
        clock.advance(_TIMEOUT)
        await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "paused"


async def test_an_automatic_pause_that_fails_keeps_the_sandbox_running_and_is_repeated(
    timed: Server, owner: Team, clock: FakeClock, host: HostDouble
) -> None:
    id = await _create(owner)
    host.fail["pause"] = HostFailure("The disk is full")
    clock.advance(_TIMEOUT)
    attempts = []
    for _ in range(20):
        await timed.plane.autopause.sweep()
        attempts.append([call for call, _ in host.calls].count("pause"))
        clock.advance(1)
    assert attempts == [1] * 5 + [2] * 10 + [3] * 5
    assert await _status(owner, id) == "running"
    events = (await owner.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert (events[0]["event"], events[0]["reason"]) == ("pause_failed", "The disk is full")
    del host.fail["pause"]
    clock.advance(60)
    await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "paused"


async def test_a_resumed_sandbox_counts_from_its_resume(
    timed: Server, owner: Team, clock: FakeClock
) -> None:
    id = await _create(owner)
    clock.advance(_TIMEOUT)
    await timed.plane.autopause.sweep()
    clock.advance(1000)
    await owner.client.post(f"/v1/sandboxes/{id}/resume")
    assert await timed.plane.autopause.sweep()
    assert await _status(owner, id) == "running"


async def test_idle_sandboxes_are_paused_without_a_request(
    tmp_path: Path, host: HostDouble
) -> None:
    async with serve(make_settings(tmp_path, None), host) as server:
        team = await server.team()
        id = await _create(team, 1)
        await host.called["pause"].wait()
        await server.plane.operations.wait_for_others(SandboxId(id))
        assert await _status(team, id) == "paused"
