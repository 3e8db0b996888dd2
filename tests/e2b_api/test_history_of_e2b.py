"""Metrics and logs as E2B's clients and its dashboard ask for them."""

import json
from datetime import UTC, datetime

from e2b.api.client.models import SandboxLogs, SandboxLogsV2Response, SandboxMetric

from support.api_server import Server, Team
from support.e2b import created
from support.host_double import HostDouble
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import LogLine, LogSource, Sample

_GUEST = {
    "mem_total": 400,
    "mem_used": 100,
    "mem_cache": 50,
    "disk_total": 9000,
    "disk_used": 7000,
}


def _measured(host: HostDouble, id: str) -> int:
    """What a host has measured of a sandbox in three moments; the first one's time."""
    now = int(datetime.now(UTC).timestamp()) - 60
    host.measured[SandboxId(id)] = [
        Sample(time=now, cpu_count=1, cpu_used_pct=50.5, **_GUEST),
        Sample(time=now + 5, cpu_count=1, cpu_used_pct=12.5),
        Sample(time=now + 10, cpu_count=1, cpu_used_pct=1.0, **_GUEST),
    ]
    return now


async def test_metrics_of_e2b_are_those_in_which_all_is_known(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await created(user)
    first = _measured(host, id)
    path = f"/sandboxes/{id}/metrics"
    found = [SandboxMetric.from_dict(each) for each in (await user.client.get(path)).json()]
    assert [each.timestamp_unix - first for each in found] == [0, 10]
    assert found[0].timestamp.timestamp() == first
    assert (found[0].cpu_used_pct, found[0].mem_used, found[0].disk_total) == (50.5, 100, 9000)
    answer = await user.client.get(path, params={"start": first + 1, "end": first + 10})
    assert [each["cpuUsedPct"] for each in answer.json()] == [1.0]
    answer = await user.client.get(path, params={"start": 2, "end": 1})
    assert (answer.status_code, answer.json()["code"]) == (400, 400)


async def test_the_last_metrics_of_several_sandboxes(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    other = await faulty.team()
    ids = [await created(user), await created(user), await created(other)]
    for id in (ids[0], ids[2]):
        _measured(host, id)
    query = {"sandbox_ids": ",".join([*ids, "nothing"])}
    answer = await user.client.get("/sandboxes/metrics", params=query)
    assert list(answer.json()["sandboxes"]) == [ids[0]]
    assert answer.json()["sandboxes"][ids[0]]["cpuUsedPct"] == 1.0
    query = {"sandbox_ids": ",".join(map(str, range(101)))}
    assert (await user.client.get("/sandboxes/metrics", params=query)).status_code == 400


async def test_logs_of_e2b_are_the_lines_of_the_console(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await created(user)
    host.logs[SandboxId(id)] = [
        LogLine(
            number=number,
            at=datetime.fromtimestamp(number, UTC),
            source=LogSource.KERNEL,
            text=f"line {number}",
        )
        for number in range(1, 2502)
    ]

    async def said(**query: str | int) -> list[str]:
        answer = await user.client.get(f"/v2/sandboxes/{id}/logs", params=query)
        assert answer.status_code == 200, answer.text
        return [each.message for each in SandboxLogsV2Response.from_dict(answer.json()).logs]

    assert len(await said()) == 1000
    assert await said(cursor=2500_000) == ["line 2500", "line 2501"]
    assert await said(direction="backward", limit=2) == ["line 2501", "line 2500"]
    assert await said(direction="backward", cursor=1000) == ["line 1"]
    assert await said(search="line 250") == ["line 250", "line 2500", "line 2501"]
    assert await said(level="info", limit=1) == ["line 1"]
    assert await said(level="error") == []
    answer = await user.client.get(f"/sandboxes/{id}/logs", params={"start": 2_000, "limit": 1})
    old = SandboxLogs.from_dict(answer.json())
    assert old.log_entries[0].fields.to_dict() == {"source": "kernel"}
    assert old.log_entries[0].message == "line 2"
    told = {"level": "info", "logger": "kernel", "message": "line 2"}
    assert json.loads(old.logs[0].line) == told
    for query in ({"limit": 1001}, {"cursor": -1}, {"level": "loud"}, {"unheardOf": 1}):
        answer = await user.client.get(f"/v2/sandboxes/{id}/logs", params=query)
        assert answer.status_code == 400, query
