"""What `/metrics` says of a whole server, with processes instead of VMs."""

import httpx2
import pytest

from support.api_server import Server, Team, serve_processes
from support.samples import Samples
from wrenn_sandbox.settings import Settings

pytestmark = pytest.mark.parametrize("database_url", [None])

_STAGES = {
    "create": {"admission", "image", "slot", "disk", "restore", "network", "init"},
    "pause": {"stop", "capture", "store", "release"},
    "resume": {"admission", "slot", "disk", "restore", "network", "init"},
    "rollback": {"admission", "image", "slot", "disk", "restore", "network", "init", "release"},
    "checkpoint": {"stop", "capture", "standstill", "store"},
    "snapshot": {"stop", "capture", "store", "release"},
    "template": {"slot", "disk", "boot", "init", "stop", "capture"},
}


async def _post(team: Team, path: str, status: int, **body: object) -> httpx2.Response:
    answer = await team.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer


async def _create(team: Team, **body: object) -> str:
    return str((await _post(team, "/v1/sandboxes", 201, **body)).json()["id"])


def _operations(samples: Samples) -> dict[tuple[str, str, str], float]:
    """How often each operation was done, by its path and outcome."""
    found = {}
    for labels in samples.labels("wrenn_operation_seconds_count"):
        known = {key: value for key, value in labels.items() if value}
        count = samples.value("wrenn_operation_seconds_count", **known)
        assert count is not None
        found[labels["operation"], labels["path"], labels["outcome"]] = count
    return found


async def test_operations_and_their_stages_are_timed(server: Server, team: Team) -> None:
    id = await _create(team)
    await _create(team)
    url = f"/v1/sandboxes/{id}"
    await _post(team, f"{url}/exec", 200, cmd="true")
    snapshot = (await _post(team, f"{url}/snapshots", 201)).json()["name"]
    await _post(team, f"{url}/rollback", 200, snapshot=snapshot)
    await _post(team, f"{url}/pause", 200)
    await _post(team, f"{url}/resume", 200)
    await _post(team, f"{url}/pause", 200)
    await _post(team, f"{url}/resume", 200, memory=False)
    await _post(team, f"{url}/fork", 201, count=2)
    await _post(team, "/v1/snapshots", 201, sandbox_id=id)
    samples = await Samples.of(server.client())
    assert _operations(samples) == {
        ("create", "booted", "ok"): 1,
        ("create", "restored", "ok"): 3,
        ("exec", "", "ok"): 1,
        ("checkpoint", "", "ok"): 1,
        ("rollback", "restored", "ok"): 1,
        ("pause", "", "ok"): 2,
        ("resume", "restored", "ok"): 1,
        ("resume", "booted", "ok"): 1,
        ("fork", "", "ok"): 1,
        ("snapshot", "", "ok"): 1,
    }
    stages: dict[str, set[str]] = {}
    for labels in samples.labels("wrenn_stage_seconds_count"):
        stages.setdefault(labels["operation"], set()).add(labels["stage"])
    assert {each: stages.get(each, set()) & wanted for each, wanted in _STAGES.items()} == _STAGES
    assert "boot" in stages["resume"]
    assert samples.value("wrenn_stage_seconds_count", operation="pause", stage="capture") == 2
    assert samples.value("wrenn_exec_overhead_seconds_count") == 1


async def test_a_vm_of_the_pool_is_a_hot_create(restartable: Settings) -> None:
    settings = restartable.model_copy(update={"hot_pool_size": 1})
    async with serve_processes(settings) as (server, host):
        team = await server.team()
        await host._pool.filled()
        before = await Samples.of(server.client())
        assert before.value("wrenn_pool_ready") == before.value("wrenn_pool_wanted") == 1
        assert before.value("wrenn_host_vms", state="pooled") == 1
        await _create(team)
        await _create(team)
        after = await Samples.of(server.client())
        operations = _operations(after)
        assert operations["create", "hot", "ok"] == 1
        assert operations["create", "restored", "ok"] == 1
        assert (
            after.value("wrenn_pool_hits_total"),
            after.value("wrenn_pool_misses_total"),
        ) == (
            1,
            1,
        )
        assert after.value("wrenn_host_vms", state="running") == 2


async def test_refusals_say_what_there_is_too_little_of(restartable: Settings) -> None:
    settings = restartable.model_copy(update={"max_running": 1})
    async with serve_processes(settings) as (server, _):
        team = await server.team()
        await _create(team)
        await _post(team, "/v1/sandboxes", 503)
        await _post(team, "/v1/sandboxes", 404, template="nobodys")
        samples = await Samples.of(server.client())
    assert samples.value("wrenn_refusals_total", code="no_capacity") == 1
    assert samples.value("wrenn_refusals_total", code="not_found") == 1
    assert samples.value("wrenn_refusals_total", code="conflict") == 0
    assert samples.value("wrenn_host_refusals_total", reason="sandboxes") == 1
    assert _operations(samples)["create", "", "refused"] == 1
    assert samples.value("wrenn_host_memory_promised_bytes") == 512 << 20
    assert samples.value("wrenn_host_slots", state="used") == 1


async def test_what_is_stored_is_counted_by_its_purpose(
    server: Server, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wrenn_sandbox.host.disk_use._STORED_SEC", 0.0)
    id = await _create(team)
    empty = await Samples.of(server.client())
    await _post(team, f"/v1/sandboxes/{id}/snapshots", 201)
    await _post(team, f"/v1/sandboxes/{id}/pause", 200)
    samples = await Samples.of(server.client())

    def stored(of: Samples, kind: str) -> float:
        return of.value("wrenn_stored_bytes", kind=kind) or 0.0

    assert stored(empty, "images") > 0 < stored(empty, "running")
    assert stored(empty, "snapshots") == stored(empty, "paused") == 0
    assert stored(samples, "snapshots") > 0 < stored(samples, "paused")
    assert stored(samples, "running") == 0
    assert samples.value("wrenn_sandboxes", status="paused") == 1


async def test_no_more_series_come_with_more_teams_and_sandboxes(server: Server) -> None:
    async def round(word: str) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        team = await server.team()
        for _ in range(2):
            id = await _create(team, metadata={word: word}, envs={word: word})
            url = f"/v1/sandboxes/{id}"
            await _post(team, f"{url}/exec", 200, cmd="sh", args=["-c", f": {word}"])
            await _post(team, f"{url}/exec", 400, cmd=word, cwd=f"/{word}")
            await _post(team, f"{url}/snapshots", 201, name=word + id[-6:])
            await _post(team, f"{url}/pause", 200)
            await _post(team, "/v1/sandboxes", 404, template=word)
            await _post(
                team,
                "/v1/webhooks",
                201,
                url=f"https://{word}.invalid/",
                events=["snapshot.deleted"],
            )
        bare = server.client(checked=False)
        await bare.request(word.upper(), f"/{word}/{word}?{word}={word}")
        await bare.get(f"/v1/sandboxes/{word}", headers={"X-API-Key": word, "User-Agent": word})
        await bare.get(f"/health/{word}")
        return (await Samples.of(server.client())).series()

    await round("adder")
    first = await round("anaconda")
    names = " ".join(value for _, labels in first for pair in labels for value in pair)
    assert "anaconda" not in names.lower()
    for word in ("boa", "cobra"):
        last = await round(word)
    assert last == first
