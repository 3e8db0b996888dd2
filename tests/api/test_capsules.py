"""`/v1/capsules`, as Wrenn's own client calls sandboxes."""

from datetime import UTC, datetime

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import Sample


async def test_capsules_are_sandboxes(faulty: Server, user: Team) -> None:
    made = (await user.client.post("/v1/capsules", json={"metadata": {"a": "1"}})).json()
    path = f"/v1/capsules/{made['id']}"
    assert (await user.client.get(path)).json() == made
    assert (await user.client.get("/v1/capsules?metadata.a=1")).json() == [made]
    assert (await user.client.post(f"{path}/pause")).json()["status"] == "paused"
    assert (await user.client.delete(path)).status_code == 204
    for unknown in ("/v1/capsulesx", "/v1/capsules/stats/x", "/v1/capsule"):
        assert (await user.client.get(unknown)).status_code == 404


async def test_reports_on_capsules(faulty: Server, user: Team, host: HostDouble) -> None:
    id = (await user.client.post("/v1/capsules", json={})).json()["id"]
    stats = (await user.client.get("/v1/capsules/stats?range=30d")).json()
    current = {"running_count": 1, "vcpus_reserved": 1, "memory_mb_reserved": 512}
    assert stats == {"range": "30d", "current": current}
    usage = (await user.client.get("/v1/capsules/usage")).json()
    assert (usage["from"], usage["to"]) == (usage["points"][0]["date"], usage["points"][-1]["date"])
    assert {"date", "cpu_minutes", "ram_mb_minutes"} == usage["points"][0].keys()
    now = int(datetime.now(UTC).timestamp())
    host.measured[SandboxId(id)] = [
        Sample(time=now - age, cpu_count=1, cpu_used_pct=2.5) for age in (1000, 30)
    ]
    metrics = (await user.client.get(f"/v1/capsules/{id}/metrics")).json()
    point = {"timestamp_unix": now - 30, "cpu_pct": 2.5, "mem_bytes": None, "disk_bytes": None}
    assert metrics == {"sandbox_id": id, "range": "10m", "points": [point]}
    hour = (await user.client.get(f"/v1/capsules/{id}/metrics?range=1h")).json()
    assert len(hour["points"]) == 2
    assert (await user.client.get(f"/v1/capsules/{id}/metrics?range=1y")).status_code == 400
