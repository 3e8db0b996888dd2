"""Snapshots, forks and rollbacks through the whole server, with processes instead of machines."""

import asyncio
from functools import partial
from pathlib import Path

import httpx2
import pytest

from support.api_server import FakeClock, Server, Team, serve_processes
from wrenn_sandbox.settings import Settings

pytestmark = pytest.mark.parametrize("database_url", [None])


async def _create(client: httpx2.AsyncClient, **body: object) -> str:
    answer = await client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _shell(client: httpx2.AsyncClient, id: str, script: str) -> str:
    body = {"cmd": "sh", "args": ["-c", script]}
    answer = await client.post(f"/v1/sandboxes/{id}/exec", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


def _images(settings: Settings) -> set[Path]:
    return set((settings.data_dir / "images").iterdir())


@pytest.mark.parametrize("paused", [False, True])
async def test_forks_have_the_files_of_their_source_and_a_life_of_their_own(
    server: Server, team: Team, paused: bool
) -> None:
    client = team.client
    id = await _create(client, timeout_sec=600)
    await _shell(client, id, "echo kept > file")
    images = _images(server.settings)
    if paused:
        assert (await client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
    answer = await client.post(f"/v1/sandboxes/{id}/fork", json={"count": 3})
    assert answer.status_code == 201, answer.text
    forks = [each["sandbox"]["id"] for each in answer.json()]
    shown = (await client.get(f"/v1/sandboxes/{id}")).json()
    assert shown["status"] == ("paused" if paused else "running")
    for fork in forks:
        assert await _shell(client, fork, "cat file; echo own > file; cat file") == "kept\nown\n"
    if paused:
        assert (await client.post(f"/v1/sandboxes/{id}/resume")).status_code == 200
    assert await _shell(client, id, "cat file") == "kept\n"
    (held,) = _images(server.settings) - images
    assert held.exists(), "the forks run on it"
    for each in (*forks, id):
        assert (await client.delete(f"/v1/sandboxes/{each}")).status_code == 204
    await server.plane.reconciler.sweep()
    assert _images(server.settings) == images


async def test_a_snapshot_and_the_way_back(server: Server, team: Team) -> None:
    client = team.client
    id = await _create(client)
    await _shell(client, id, "echo first > file")
    made = await client.post(f"/v1/sandboxes/{id}/snapshots", json={"name": "first"})
    assert made.status_code == 201, made.text
    for state in ("running", "paused", "running"):
        await _shell(client, id, "echo later > file; echo later > other")
        if state == "paused":
            assert (await client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
        body = {"snapshot": "first"}
        answer = await client.post(f"/v1/sandboxes/{id}/rollback", json=body)
        assert (answer.status_code, answer.json()["status"]) == (200, "running"), answer.text
        assert await _shell(client, id, "cat file; ls") == "first\nfile\n"
    assert (await client.delete("/v1/snapshots/first")).status_code == 204
    assert (await client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
    assert (await client.post(f"/v1/sandboxes/{id}/resume")).status_code == 200
    assert await _shell(client, id, "cat file") == "first\n"


async def test_what_is_asked_for_during_a_copy_waits_for_it(server: Server, team: Team) -> None:
    client = team.client
    id = await _create(client)
    path = f"/v1/sandboxes/{id}"
    await _shell(client, id, "echo kept > file")
    post = partial(client.post, json={"name": "mine", "count": 2})
    copied, forked, paused = await asyncio.gather(
        post(f"{path}/snapshots"), post(f"{path}/fork"), post(f"{path}/pause")
    )
    for answer in (copied, forked):
        assert answer.status_code in (201, 409), answer.text
    assert paused.status_code == 200, paused.text
    assert (await client.get(path)).json()["status"] == "paused"
    await server.plane.reconciler.sweep()
    assert (await client.get(path)).json()["status"] == "paused"
    assert (await post(f"{path}/snapshots?overwrite=true")).status_code == 201
    copy = await _create(client, template="mine")
    assert await _shell(client, copy, "cat file") == "kept\n"


async def test_a_new_server_goes_back_to_what_an_older_one_stored(
    restartable: Settings, clock: FakeClock
) -> None:
    async with serve_processes(restartable, clock) as (server, _):
        team = await server.team()
        id = await _create(team.client)
        await _shell(team.client, id, "echo kept > file")
        path = f"/v1/sandboxes/{id}"
        made = await team.client.post(f"{path}/snapshots", json={"name": "mine"})
        assert made.status_code == 201, made.text
        await _shell(team.client, id, "rm file")
    async with serve_processes(restartable, clock) as (server, _):
        client = server.client(team.bearer)
        rolled = await client.post(f"{path}/rollback", json={"snapshot": "mine"})
        assert rolled.status_code == 200, rolled.text
        assert await _shell(client, id, "cat file") == "kept\n"
