"""What happens to operations under way when the server stops."""

import asyncio

import pytest

from api.double import HostDouble
from api.harness import Team, serve
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
