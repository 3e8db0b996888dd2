"""A host obeys one database: another one would take its sandboxes for leftovers."""

import asyncio
from pathlib import Path

import pytest

from support.api_server import make_settings, serve, serve_processes
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.errors import Conflict
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.ids import new_installation_id
from wrenn_sandbox.settings import Settings

pytestmark = pytest.mark.slow


def _with_other_database(settings: Settings, tmp_path: Path) -> Settings:
    return make_settings(settings.data_dir, f"sqlite:///{tmp_path}/other.db")


async def test_a_database_has_one_identity(settings: Settings) -> None:
    stores = [Store(settings.sql_url) for _ in range(3)]
    await asyncio.gather(*(store.open() for store in stores))
    found = await asyncio.gather(
        *(store.installation.identity(new_installation_id()) for store in stores)
    )
    assert len(set(found)) == 1
    assert await stores[0].installation.identity(new_installation_id()) == found[0]
    for store in stores:
        await store.close()


async def _left_behind(settings: Settings, *, paused: bool) -> tuple[str, str]:
    """A team's key and its one sandbox, behind a server that has stopped."""
    async with serve_processes(settings) as (server, _):
        team = await server.team()
        id = (await team.client.post("/v1/sandboxes")).json()["id"]
        if paused:
            assert (await team.client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
    return team.key, id


@pytest.mark.parametrize("paused", [True, False])
async def test_another_database_is_refused_and_nothing_is_lost(
    restartable: Settings, tmp_path: Path, paused: bool
) -> None:
    key, id = await _left_behind(restartable, paused=paused)
    for _ in range(2):
        with pytest.raises(Conflict, match="DATABASE_URL"):
            async with serve_processes(_with_other_database(restartable, tmp_path)):
                pass
    async with serve_processes(restartable) as (server, _):
        await server.plane.reconciler.sweep()
        client = server.client({"X-API-Key": key})
        if paused:
            assert (await client.post(f"/v1/sandboxes/{id}/resume")).status_code == 200
        answer = await client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
        assert answer.json()["exit_code"] == 0


async def test_a_paused_sandbox_that_cannot_be_read_keeps_the_host_claimed(
    restartable: Settings, tmp_path: Path
) -> None:
    async with serve_processes(restartable) as (server, _):
        team = await server.team()
        id = (await team.client.post("/v1/sandboxes")).json()["id"]
        await team.client.post(f"/v1/sandboxes/{id}/pause")
    (manifest,) = Paths(restartable.data_dir).paused.glob("*/*/manifest.json")
    kept = manifest.read_bytes()
    manifest.write_bytes(b"{")
    with pytest.raises(Conflict, match="DATABASE_URL"):
        async with serve_processes(_with_other_database(restartable, tmp_path)):
            pass
    manifest.write_bytes(kept)


async def test_a_snapshot_alone_is_reason_enough(restartable: Settings, tmp_path: Path) -> None:
    async with serve_processes(restartable) as (server, _):
        team = await server.team()
        id = (await team.client.post("/v1/sandboxes")).json()["id"]
        made = await team.client.post("/v1/snapshots", json={"sandbox_id": id, "name": "mine"})
        assert made.status_code == 201
    with pytest.raises(Conflict, match="snapshots"):
        async with serve_processes(_with_other_database(restartable, tmp_path)):
            pass


async def test_a_host_without_sandboxes_changes_hands(settings: Settings, tmp_path: Path) -> None:
    other = _with_other_database(settings, tmp_path)
    for each in (settings, other, settings):
        async with serve_processes(each) as (_, host):
            assert await host.sandboxes() == []
    owner = Paths(settings.data_dir).owner
    assert owner.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("paused", [True, False])
async def test_another_data_directory_is_refused_and_nothing_is_lost(
    restartable: Settings, tmp_path: Path, paused: bool
) -> None:
    key, id = await _left_behind(restartable, paused=paused)
    others = make_settings(tmp_path / "others", None)
    async with serve_processes(others):
        pass
    database = restartable.database_url or f"sqlite:///{restartable.data_dir}/wrenn.db"
    for data_dir in (tmp_path / "new", others.data_dir):
        with pytest.raises(Conflict, match="WRENN_DATA_DIR"):
            async with serve_processes(make_settings(data_dir, database)):
                pass
    async with serve_processes(restartable) as (server, _):
        await server.plane.reconciler.sweep()
        shown = await server.client({"X-API-Key": key}).get(f"/v1/sandboxes/{id}")
        assert shown.json()["status"] == ("paused" if paused else "running")
    await _gone_for_good(make_settings(tmp_path / "new", database))


async def _gone_for_good(settings: Settings) -> None:
    """The operator says that the sandboxes are not to be found anywhere."""
    Paths(settings.data_dir).owner.touch()
    async with serve_processes(settings) as (server, host):
        await server.plane.reconciler.sweep()
        counts = await server.plane.store.all_sandboxes.count_by_status()
        assert counts == {"error": 1}
        assert await host.sandboxes() == []
    assert Paths(settings.data_dir).owner.read_text()


async def test_giving_the_sandboxes_up(restartable: Settings, tmp_path: Path) -> None:
    async with serve_processes(restartable) as (server, _):
        team = await server.team()
        await team.client.post("/v1/sandboxes")
    Paths(restartable.data_dir).owner.unlink()
    async with serve_processes(_with_other_database(restartable, tmp_path)) as (server, host):
        async with asyncio.timeout(10):
            while await host.sandboxes():  # the first sweep may have it in hand
                await server.plane.reconciler.sweep()
    Paths(restartable.data_dir).owner.unlink()


async def test_the_host_is_claimed_before_anything_else(settings: Settings) -> None:
    calls = []

    class Watched:
        def __init__(self, host: HostAgent) -> None:
            self._host = host

        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(self._host, name)

    host = await HostAgent.start(settings)
    async with serve(settings, Watched(host)):  # type: ignore[arg-type]
        assert calls[0] == "claim"
    await host.close()
