"""A host with too little room: refused before anything is started, and nothing is lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from support.api_server import serve_processes
from wrenn_sandbox.host import admission
from wrenn_sandbox.host.admission import Free
from wrenn_sandbox.settings import Settings


class Disk:
    """The disk as the host sees it; `free_mb` of None is the real one."""

    def __init__(self) -> None:
        self.free_mb: int | None = None
        self._measure = admission.measure

    def measure(self, data_dir: Path) -> Free:
        found = self._measure(data_dir)
        if self.free_mb is None:
            return found
        return Free(found.memory_total_mb, found.memory_free_mb, self.free_mb)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(admission, "measure", disk.measure)
    yield disk
    disk.free_mb = None


def _room_for(settings: Settings, machines: int) -> Settings:
    """Settings with which so many machines of 512 MiB fit."""
    free = admission.measure(settings.data_dir.parent)
    usable = free.memory_total_mb - settings.memory_reserve_mb
    return settings.model_copy(update={"memory_overcommit": (machines * 512 + 256) / usable})


def _full(answer: httpx2.Response) -> bool:
    code = answer.json().get("error", {}).get("code")
    return (answer.status_code, code) == (503, "no_capacity")


@pytest.mark.parametrize("database_url", [None])
async def test_no_more_memory_is_promised_than_may_be(restartable: Settings) -> None:
    settings = _room_for(restartable, 2)
    async with serve_processes(settings) as (server, _):
        client = (await server.team()).client
        answers = await asyncio.gather(*(client.post("/v1/sandboxes", json={}) for _ in range(6)))
        made = [each.json()["id"] for each in answers if each.status_code == 201]
        assert len(made) == 2
        assert all(_full(each) for each in answers if each.status_code != 201)
        assert len((await client.get("/v1/sandboxes")).json()) == 2
        assert len(list((settings.data_dir / "run").iterdir())) == 2

        for _ in range(2):
            for id in made[-2:]:
                assert (await client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
            made += [(await client.post("/v1/sandboxes", json={})).json()["id"] for _ in range(2)]
        for id in made[-2:]:
            assert (await client.delete(f"/v1/sandboxes/{id}")).status_code == 204
        waking = [client.post(f"/v1/sandboxes/{id}/resume") for id in made[:-2]]
        resumed = await asyncio.gather(*waking)
        assert sorted(each.status_code for each in resumed) == [200, 200, 503, 503]
        assert "retry-after" in next(each for each in resumed if _full(each)).headers


@pytest.mark.parametrize("database_url", [None])
async def test_a_full_disk_stops_nothing_that_runs(restartable: Settings, disk: Disk) -> None:
    async with serve_processes(restartable) as (server, _):
        client = (await server.team()).client
        id = (await client.post("/v1/sandboxes", json={"memory_mb": 256})).json()["id"]
        disk.free_mb = restartable.disk_reserve_mb // 4 - 1
        assert _full(await client.post("/v1/sandboxes", json={}))
        assert _full(await client.post(f"/v1/sandboxes/{id}/pause"))
        body = {"sandbox_id": id, "name": "mine"}
        assert _full(await client.post("/v1/snapshots", json=body))
        run = await client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
        assert run.json()["exit_code"] == 0
        [only] = (await client.get("/v1/sandboxes")).json()
        assert (only["id"], only["status"]) == (id, "running")

        disk.free_mb = restartable.disk_reserve_mb - 1
        assert (await client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
        assert _full(await client.post(f"/v1/sandboxes/{id}/resume"))
        disk.free_mb = restartable.disk_reserve_mb + 1
        other = await client.post("/v1/sandboxes", json={"memory_mb": 300})
        assert _full(other), "there is no room to prepare another size of machine"
        assert (await client.post(f"/v1/sandboxes/{id}/resume")).status_code == 200


@pytest.mark.parametrize("database_url", [None])
async def test_what_is_stored_shows_in_the_teams_use(restartable: Settings) -> None:
    async with serve_processes(restartable) as (server, _):
        client = (await server.team()).client
        id = (await client.post("/v1/sandboxes", json={})).json()["id"]
        script = "head -c 3M /dev/urandom > kept"
        body = {"cmd": "sh", "args": ["-c", script]}
        assert (await client.post(f"/v1/sandboxes/{id}/exec", json=body)).status_code == 200
        assert (await client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
        await server.plane.reconciler.sweep()
        shown = (await client.get(f"/v1/sandboxes/{id}")).json()["disk_bytes"]
        assert shown >= 3 << 20
        assert (await client.get("/v1/usage")).json()["used"]["disk_bytes"] == shown
        assert (await client.delete(f"/v1/sandboxes/{id}")).status_code == 204
        assert (await client.get("/v1/usage")).json()["used"]["disk_bytes"] == 0
