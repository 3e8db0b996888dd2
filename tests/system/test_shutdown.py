"""What happens to sandboxes and to operations under way when the server stops."""

import asyncio
from pathlib import Path

import pytest

from support.api_server import Server, Team, make_settings, serve, serve_processes
from support.host_double import HostDouble
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Phase


async def _sandbox(team: Team) -> SandboxId:
    return SandboxId((await team.client.post("/v1/sandboxes")).json()["id"])


async def test_operations_get_time_to_end(settings: Settings, host: HostDouble) -> None:
    async with serve(settings, host) as server:
        team = await server.team()
        id = await _sandbox(team)
        gate = host.hold("pause")
        pausing = server.start(team.client.post(f"/v1/sandboxes/{id}/pause"))
        await gate.arrived.wait()
        closing = server.start(server.plane.operations.close(grace=30))
        await asyncio.sleep(0)
        refused = await team.client.post("/v1/sandboxes")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
        gate.opened.set()
        assert (await pausing).status_code == 200
        await closing
    async with serve(settings, host) as server:
        sandbox = await server.plane.store.all_sandboxes.get(id)
        assert sandbox is not None
        assert sandbox.state == "paused"


@pytest.mark.parametrize("done", [True, False])
async def test_an_operation_cut_short_is_settled_at_the_next_start(
    settings: Settings, host: HostDouble, done: bool
) -> None:
    async with serve(settings, host) as server:
        team = await server.team()
        id = await _sandbox(team)
        gate = host.hold("pause")
        server.start(team.client.post(f"/v1/sandboxes/{id}/pause"))
        await gate.arrived.wait()
        await server.plane.operations.close(grace=0)
    host.gates.clear()
    if done:
        host.phases[id] = Phase.PAUSED
    async with serve(settings, host) as server:
        await server.plane.reconciler.sweep()
        sandbox = await server.plane.store.all_sandboxes.get(id)
        assert sandbox is not None
        assert sandbox.state == ("paused" if done else "running")


@pytest.fixture
def pausing(tmp_path: Path, database_url: str | None) -> Settings:
    """Settings of a server that pauses its sandboxes when it stops."""
    return make_settings(tmp_path / "data", database_url, on_stop="pause")


async def _states(server: Server, *ids: SandboxId) -> list[str]:
    found = [await server.plane.store.all_sandboxes.get(id) for id in ids]
    return [sandbox.state.value for sandbox in found if sandbox is not None]


async def test_running_sandboxes_are_kept(settings: Settings, host: HostDouble) -> None:
    async with serve(settings, host) as server:
        id = await _sandbox(await server.team())
    assert host.phases == {id: Phase.RUNNING}
    async with serve(settings, host) as server:
        await server.plane.reconciler.sweep()
        assert await _states(server, id) == ["running"]


async def test_running_sandboxes_are_paused_a_few_at_a_time(
    pausing: Settings, host: HostDouble
) -> None:
    async with serve(pausing, host) as server:
        team = await server.team()
        ids = [await _sandbox(team) for _ in range(6)]
        await team.client.delete(f"/v1/sandboxes/{ids[5]}")
        gate = host.hold("pause")
        stopping = server.start(server.plane.pause_at_stop.run())
        await gate.arrived.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        assert [call for call, _ in host.calls].count("pause") <= 4
        gate.opened.set()
        await stopping
        del host.gates["pause"]
        ids.append(await _sandbox(team))
    assert {*host.phases.values()} == {Phase.PAUSED}
    async with serve(pausing, host) as server:
        await server.plane.reconciler.sweep()
        assert await _states(server, *ids) == ["paused"] * 5 + ["stopped", "paused"]
        client = server.client({"X-API-Key": team.key})
        for id in (ids[0], ids[6]):
            (event, *_) = (await client.get(f"/v1/sandboxes/{id}/events")).json()
            assert (event["event"], event["actor"]) == ("paused", "shutdown")
            assert (await client.post(f"/v1/sandboxes/{id}/resume")).status_code == 200


async def test_a_sandbox_that_cannot_be_paused_outlives_the_server(
    pausing: Settings, host: HostDouble
) -> None:
    async with serve(pausing, host) as server:
        team = await server.team()
        id = await _sandbox(team)
        host.fail["pause"] = HostFailure("The disk is full")
    assert host.phases == {id: Phase.RUNNING}
    host.fail.clear()
    async with serve(make_settings(pausing.data_dir, pausing.database_url), host) as server:
        assert await _states(server, id) == ["running"]
        client = server.client({"X-API-Key": team.key})
        (event, *_) = (await client.get(f"/v1/sandboxes/{id}/events")).json()
        assert (event["event"], event["reason"]) == ("pause_failed", "The disk is full")


async def test_what_takes_too_long_keeps_running(
    tmp_path: Path, database_url: str | None, host: HostDouble
) -> None:
    short = make_settings(
        tmp_path, database_url, on_stop="pause", stop_pause_timeout_sec=0.05, shutdown_grace_sec=0
    )
    async with serve(short, host) as server:
        ids = [await _sandbox(await server.team()) for _ in range(5)]
        gate = host.hold("pause")
    assert gate.arrived.is_set()
    assert {*host.phases.values()} == {Phase.RUNNING}
    host.gates.clear()
    async with serve(make_settings(tmp_path, database_url), host) as server:
        await server.plane.reconciler.sweep()
        assert await _states(server, *ids) == ["running"] * 5


async def test_a_second_signal_skips_the_rest(pausing: Settings, host: HostDouble) -> None:
    async with serve(pausing, host) as server:
        team = await server.team()
        ids = [await _sandbox(team) for _ in range(6)]
        gate = host.hold("pause")
        stopping = server.start(server.plane.pause_at_stop.run())
        await gate.arrived.wait()
        server.plane.pause_at_stop.skip()
        await stopping
        gate.opened.set()
    begun = {id for call, id in host.calls if call == "pause"}
    assert 1 <= len(begun) <= 4
    assert {id for id in ids if host.phases[id] is Phase.PAUSED} == begun


async def test_a_create_under_way_is_paused_too(pausing: Settings, host: HostDouble) -> None:
    async with serve(pausing, host) as server:
        team = await server.team()
        gate = host.hold("create")
        creating = server.start(team.client.post("/v1/sandboxes"))
        await gate.arrived.wait()
        closing = server.start(server.plane.operations.close(grace=30))
        await asyncio.sleep(0)
        gate.opened.set()
        assert (await creating).status_code == 201
        await closing
    assert {*host.phases.values()} == {Phase.PAUSED}


async def test_machines_are_really_paused(restartable: Settings) -> None:
    changed = restartable.model_copy(update={"on_stop": "pause"})
    async with serve_processes(changed) as (server, _):
        team = await server.team()
        ids = [await _sandbox(team) for _ in range(3)]
    async with serve_processes(changed) as (server, _):
        await server.plane.reconciler.sweep()
        assert await _states(server, *ids) == ["paused"] * 3
        client = server.client({"X-API-Key": team.key})
        for id in ids:
            assert (await client.post(f"/v1/sandboxes/{id}/resume")).status_code == 200
