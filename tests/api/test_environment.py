"""The environment that a sandbox gives to all its commands."""

from datetime import UTC, datetime

import pytest
from sqlalchemy import func, select

from support.api_server import Server, Team, serve_processes
from support.host_double import HostDouble
from support.listening import listening
from support.sockets import output_of, talking
from wrenn_sandbox.control.store.sandboxes import Change
from wrenn_sandbox.control.store.tables import sandbox_envs
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.model.sandbox import Event
from wrenn_sandbox.settings import Settings

_ENVS = {"TOKEN": "s3cr3t ü=\n'", "LANG": "de_DE.UTF-8", "_EMPTY1": ""}
_SHOW = 'printf "%s|" "$TOKEN" "$LANG" "${_EMPTY1-none}"'
_SHOWN = "s3cr3t ü=\n'|de_DE.UTF-8||"


async def _create(team: Team, **body: object) -> str:
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _act(team: Team, id: str, action: str, **body: object) -> None:
    answer = await team.client.post(f"/v1/sandboxes/{id}/{action}", json=body)
    assert answer.status_code == 200, answer.text


async def _shown(team: Team, id: str, **fields: object) -> str:
    body = {"cmd": "sh", "args": ["-c", _SHOW], **fields}
    answer = await team.client.post(f"/v1/sandboxes/{id}/exec", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


@pytest.mark.slow
@pytest.mark.parametrize("database_url", [None])
async def test_every_kind_of_command_finds_the_environment(server: Server, team: Team) -> None:
    id = await _create(team, envs=_ENVS)
    assert await _shown(team, id) == _SHOWN
    own = _SHOWN.replace("de_DE.UTF-8", "C")
    assert await _shown(team, id, envs={"LANG": "C"}) == own
    waiting = f"{_SHOW} > shown; mkfifo gate; cat gate"
    body = {"cmd": "sh", "args": ["-c", waiting], "background": True}
    path = f"/v1/sandboxes/{id}"
    assert (await team.client.post(f"{path}/exec", json=body)).status_code == 202
    async with listening(server.app) as port:
        url = f"ws://127.0.0.1:{port}{path}"
        async with talking(f"{url}/exec/stream", team.key) as peer:
            await peer.say(type="start", cmd="sh", args=["-c", _SHOW], envs={"LANG": "C"})
            assert output_of(await peer.rest()) == own
        async with talking(f"{url}/pty", team.key) as peer:
            await peer.say(type="start", cmd="sh", args=["-c", _SHOW], cols=80, rows=24)
            frames = await peer.rest()
            assert output_of(frames, "output").replace("\r", "") == _SHOWN
    answer = await team.client.post(f"{path}/files/read", json={"path": "shown"})
    assert answer.text == _SHOWN


@pytest.mark.slow
@pytest.mark.parametrize("database_url", [None])
async def test_the_environment_outlives_pauses_reboots_and_servers(restartable: Settings) -> None:
    async with serve_processes(restartable) as (server, _):
        team = await server.team()
        id = await _create(team, envs=_ENVS)
        for body in ({}, {"memory": False}):
            await _act(team, id, "pause")
            await _act(team, id, "resume", **body)
            assert await _shown(team, id) == _SHOWN
        await _act(team, id, "pause")
    async with serve_processes(restartable) as (server, _):
        team.client = server.client({"X-API-Key": team.key})
        await _act(team, id, "resume", memory=False)
        assert await _shown(team, id) == _SHOWN


@pytest.mark.slow
@pytest.mark.parametrize("database_url", [None])
async def test_a_guest_that_goes_on_keeps_its_environment_until_it_gets_another(
    restartable: Settings,
) -> None:
    """As one does that was stored with its memory."""
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = await _create(team, envs=_ENVS)
        machine = host._sandboxes[SandboxId(id)].machine
        await machine.initialize_guest(id)
        assert await _shown(team, id) == _SHOWN
        await machine.initialize_guest(id, {})
        assert (await _shown(team, id)).endswith("|none|")


@pytest.mark.slow
@pytest.mark.parametrize("database_url", [None])
async def test_a_template_passes_no_environment_on(server: Server, team: Team) -> None:
    id = await _create(team, envs=_ENVS)
    snapshot = {"sandbox_id": id, "name": "mine"}
    assert (await team.client.post("/v1/snapshots", json=snapshot)).status_code == 201
    plain = await _create(team, template="mine")
    assert (await _shown(team, plain)).endswith("|none|")
    assert "s3cr3t" not in await _shown(team, plain)
    other = await _create(team, template="mine", envs={"TOKEN": "other", "LANG": "C"})
    assert await _shown(team, other) == "other|C|none|"


@pytest.mark.slow
@pytest.mark.parametrize("database_url", [None])
async def test_a_machine_of_the_pool_gets_the_environment(restartable: Settings) -> None:
    settings = restartable.model_copy(update={"hot_pool_size": 1})
    async with serve_processes(settings) as (server, host):
        team = await server.team()
        await host._pool.filled()
        ready = host._pool._machines[0]
        id = await _create(team, envs=_ENVS)
        assert host._sandboxes[SandboxId(id)].machine is ready
        assert await _shown(team, id) == _SHOWN
        await host._pool.filled()
        assert "s3cr3t" not in await _shown(team, await _create(team))


_BAD: list[object] = [
    {f"N{n}": "" for n in range(65)},
    {"": "x"},
    {"1A": "x"},
    {"A B": "x"},
    {"A=B": "x"},
    {"Ä": "x"},
    {"A\n": "x"},
    {"A" * 129: "x"},
    {"A": "s3cr3t\0"},
    {"A": 7},
    {"A": None},
    {"A": "ü" * 16 * 1024},
    ["A=1"],
]


async def test_environments_that_are_not_acceptable(faulty: Server, user: Team) -> None:
    for envs in _BAD:
        answer = await user.client.post("/v1/sandboxes", json={"envs": envs})
        assert answer.status_code == 400, envs
        assert answer.json()["error"]["message"].startswith("envs")
        assert "s3cr3t" not in answer.text
    assert (await user.client.get("/v1/sandboxes")).json() == []


async def test_the_largest_environment_reaches_the_host(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    largest = {f"N{n:02}": "x" for n in range(63)} | {"A" * 128: "ü" * 16194}
    assert sum(len((name + value).encode()) for name, value in largest.items()) == 32 * 1024
    id = await _create(user, envs=largest)
    assert host.envs[SandboxId(id)] == largest


async def test_no_answer_shows_the_environment(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    answers = [await user.client.post("/v1/sandboxes", json={"envs": _ENVS})]
    path = f"/v1/sandboxes/{answers[0].json()['id']}"
    answers += [await user.client.post(f"{path}/{action}") for action in ("pause", "resume")]
    answers.append(await user.client.patch(path, json={"timeout_sec": 5}))
    answers += [
        await user.client.get(url) for url in (path, "/v1/sandboxes", f"{path}/events", "/v1/usage")
    ]
    for answer in answers:
        assert answer.is_success
        assert "s3cr3t" not in answer.text
        assert "TOKEN" not in answer.text


async def _kept(server: Server) -> int:
    """How many environments the database holds."""
    async with server.plane.store._database.read() as connection:
        found = await connection.scalar(select(func.count()).select_from(sandbox_envs))
    return int(found or 0)


async def test_an_environment_is_kept_no_longer_than_its_sandbox(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    deleted, source, paused = [await _create(user, envs=_ENVS) for _ in range(3)]
    await _create(user)
    assert await _kept(faulty) == 3
    await _act(user, paused, "pause")
    await _act(user, paused, "resume")
    assert host.envs[SandboxId(paused)] == _ENVS
    await user.client.delete(f"/v1/sandboxes/{deleted}")
    assert await _kept(faulty) == 2
    await user.client.post("/v1/snapshots", json={"sandbox_id": source})
    assert await _kept(faulty) == 1
    host.fail["create"] = HostFailure("No machine")
    answer = await user.client.post("/v1/sandboxes", json={"envs": _ENVS})
    assert answer.status_code == 502
    assert await _kept(faulty) == 1
    lost = Change(Event.LOST, "host", datetime.now(UTC))
    await faulty.plane.store.all_sandboxes.apply(SandboxId(paused), lost)
    assert await _kept(faulty) == 0
