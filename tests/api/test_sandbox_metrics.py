"""What a guest uses, through the API."""

import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.ids import SandboxId

pytestmark = pytest.mark.parametrize("database_url", [None])


async def _create(team: Team) -> str:
    return str((await team.client.post("/v1/sandboxes")).json()["id"])


async def test_the_guest_tells_what_it_uses(team: Team) -> None:
    id = await _create(team)
    for _ in range(2):
        answer = await team.client.get(f"/v1/sandboxes/{id}/metrics")
        assert answer.status_code == 200
    metrics = answer.json()
    assert set(metrics) == {
        "cpu_count",
        "cpu_used_pct",
        "mem_total",
        "mem_used",
        "mem_cache",
        "disk_used",
        "disk_total",
        "mem_limit",
        "process_count",
        "process_limit",
        "egress_denied",
        "egress_denied_names",
    }
    assert metrics["cpu_count"] >= 1
    assert 0 <= metrics["cpu_used_pct"] <= 100
    assert 0 < metrics["mem_used"] < metrics["mem_total"]
    assert 0 < metrics["disk_used"] < metrics["disk_total"]


async def test_only_a_running_sandbox_of_the_team_has_them(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await _create(user)
    stranger = await faulty.team()
    for path in (f"/v1/sandboxes/{id}/metrics", "/v1/sandboxes/none/metrics"):
        assert (await stranger.client.get(path)).status_code == 404
    assert (await faulty.client().get(f"/v1/sandboxes/{id}/metrics")).status_code == 401
    await user.client.post(f"/v1/sandboxes/{id}/pause")
    answer = await user.client.get(f"/v1/sandboxes/{id}/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    assert "paused" in answer.json()["error"]["message"]


@pytest.mark.parametrize("lost", [True, False])
async def test_a_guest_that_does_not_answer(user: Team, host: HostDouble, lost: bool) -> None:
    id = await _create(user)
    host.fail["metrics"] = AgentError("The sandbox gave no metrics")
    if lost:
        del host.phases[SandboxId(id)]
    answer = await user.client.get(f"/v1/sandboxes/{id}/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "agent_error")


async def test_reading_metrics_is_no_activity(user: Team) -> None:
    id = await _create(user)
    before = (await user.client.get(f"/v1/sandboxes/{id}")).json()["last_active_at"]
    await user.client.get(f"/v1/sandboxes/{id}/metrics")
    assert (await user.client.get(f"/v1/sandboxes/{id}")).json()["last_active_at"] == before
