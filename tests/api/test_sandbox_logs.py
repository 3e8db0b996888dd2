"""Logs and past metrics of a sandbox, through the API."""

from datetime import UTC, datetime

import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import LogLine, LogSource, Sample

pytestmark = pytest.mark.parametrize("database_url", [None])

_AT = datetime(2026, 11, 1, 12, tzinfo=UTC)


async def _create(team: Team) -> SandboxId:
    return SandboxId((await team.client.post("/v1/sandboxes")).json()["id"])


def _line(number: int, text: str = "hello") -> LogLine:
    return LogLine(number=number, at=_AT, source=LogSource.CONSOLE, text=text)


async def test_lines_come_in_pages(user: Team, host: HostDouble) -> None:
    id = await _create(user)
    host.logs[id] = [_line(n) for n in range(1, 6)]
    path = f"/v1/sandboxes/{id}/logs"
    first = (await user.client.get(path, params={"limit": 3})).json()
    assert [each["id"] for each in first["lines"]] == ["1", "2", "3"]
    second = (await user.client.get(path, params={"cursor": first["cursor"]})).json()
    assert [each["id"] for each in second["lines"]] == ["4", "5"]
    none = (await user.client.get(path, params={"cursor": second["cursor"]})).json()
    assert none == {"lines": [], "cursor": "5"}
    host.logs[id].append(_line(6))
    more = (await user.client.get(path, params={"cursor": none["cursor"]})).json()
    assert [each["id"] for each in more["lines"]] == ["6"]
    back = {"direction": "backward", "limit": "4"}
    newest = (await user.client.get(path, params=back)).json()
    assert [each["id"] for each in newest["lines"]] == ["6", "5", "4", "3"]
    rest = (await user.client.get(path, params={**back, "cursor": newest["cursor"]})).json()
    assert [each["id"] for each in rest["lines"]] == ["2", "1"]
    end = (await user.client.get(path, params={**back, "cursor": rest["cursor"]})).json()
    assert end == {"lines": [], "cursor": None}


async def test_a_sandbox_that_ended_has_its_log_and_metrics(user: Team, host: HostDouble) -> None:
    id = await _create(user)
    host.logs[id] = [_line(1, "\x1b[31m\N{REPLACEMENT CHARACTER}")]
    host.measured[id] = [Sample(time=1_793_534_400, cpu_count=1, cpu_used_pct=5.0)]
    await user.client.delete(f"/v1/sandboxes/{id}")
    answer = (await user.client.get(f"/v1/sandboxes/{id}/logs")).json()
    assert [each["text"] for each in answer["lines"]] == ["\x1b[31m\N{REPLACEMENT CHARACTER}"]
    answer = (await user.client.get(f"/v1/sandboxes/{id}/metrics?start=0")).json()
    assert (answer["step_sec"], answer["samples"][0]["time"]) == (5, "2026-11-01T12:00:00Z")
    assert answer["samples"][0]["mem_used"] is None


async def test_metrics_of_a_time_have_its_ends(user: Team, host: HostDouble) -> None:
    id = await _create(user)
    host.measured[id] = [Sample(time=n, cpu_count=1, cpu_used_pct=0) for n in (100, 105, 110)]
    path = f"/v1/sandboxes/{id}/metrics"
    some = (await user.client.get(path, params={"start": 105, "end": 110})).json()["samples"]
    assert [each["time"] for each in some] == ["1970-01-01T00:01:45Z", "1970-01-01T00:01:50Z"]
    until = (await user.client.get(path, params={"end": 104})).json()["samples"]
    assert len(until) == 1
    assert "step_sec" not in (await user.client.get(path)).json()


@pytest.mark.parametrize(
    "query",
    [
        "metrics?start=5&end=4",
        "metrics?start=99999999999",
        "metrics?start=-1",
        "metrics?end=now",
        "metrics?start=1e400",
        "metrics?end=253402300800",
        "logs?cursor=x",
        "logs?cursor=-1",
        "logs?cursor=\N{SUPERSCRIPT TWO}",
        "logs?cursor=9999999999999999999",
        "logs?limit=0",
        "logs?limit=1001",
        "logs?direction=up",
    ],
)
async def test_bad_queries_are_refused(user: Team, query: str) -> None:
    id = await _create(user)
    answer = await user.client.get(f"/v1/sandboxes/{id}/{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


async def test_only_the_team_reads_them(user: Team, faulty: Server, host: HostDouble) -> None:
    id = await _create(user)
    host.logs[id] = [_line(1)]
    stranger = await faulty.team()
    for path in ("logs", "metrics?start=0"):
        assert (await stranger.client.get(f"/v1/sandboxes/{id}/{path}")).status_code == 404
        assert (await faulty.client().get(f"/v1/sandboxes/{id}/{path}")).status_code == 401
        assert (await user.client.get(f"/v1/sandboxes/none/{path}")).status_code == 404
    assert ("log", id) not in host.calls


async def test_reading_is_no_activity(user: Team) -> None:
    id = await _create(user)
    before = (await user.client.get(f"/v1/sandboxes/{id}")).json()["last_active_at"]
    for path in ("logs", "metrics?start=0"):
        assert (await user.client.get(f"/v1/sandboxes/{id}/{path}")).status_code == 200
    assert (await user.client.get(f"/v1/sandboxes/{id}")).json()["last_active_at"] == before
