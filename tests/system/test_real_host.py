"""The whole server over the real host agent, with processes instead of machines.

What the double of the host only claims is true here: what is stored is on disk, a new server on
the same data directory finds it, and images come and go.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx2
import pytest

from support.api_server import FakeClock, Server, Team, serve_processes
from wrenn_sandbox.control.service.autopause import AutoPause
from wrenn_sandbox.errors import HostFailure, NotFound
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.guest.connection import GuestGone
from wrenn_sandbox.host.images.manifest import FileDigest
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.vmm.base import MachineSpec, Process
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.ids import SandboxId, new_image_id, new_operation_id
from wrenn_sandbox.settings import Settings

_TIMEOUT = 60
pytestmark = pytest.mark.parametrize("database_url", [None])
"""What the store does at each of these turns is tried on both databases with the double."""


async def _create(client: httpx2.AsyncClient, **body: object) -> str:
    answer = await client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _shell(client: httpx2.AsyncClient, id: str, script: str) -> str:
    body = {"cmd": "sh", "args": ["-c", script]}
    answer = await client.post(f"/v1/sandboxes/{id}/exec", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["exit_code"] == 0, answer.text
    return str(answer.json()["stdout"])


async def _act(client: httpx2.AsyncClient, id: str, action: str) -> httpx2.Response:
    answer = await client.post(f"/v1/sandboxes/{id}/{action}")
    assert answer.status_code == 200, answer.text
    return answer


async def _get(client: httpx2.AsyncClient, id: str) -> dict[str, str]:
    found = (await client.get(f"/v1/sandboxes/{id}")).json()
    assert isinstance(found, dict)
    return found


async def _history(client: httpx2.AsyncClient, id: str) -> list[tuple[str, str]]:
    events = (await client.get(f"/v1/sandboxes/{id}/events")).json()
    return [(event["event"], event["actor"]) for event in reversed(events)]


async def _snapshot(
    client: httpx2.AsyncClient, id: str, name: str | None = None, query: str = ""
) -> httpx2.Response:
    body = {"sandbox_id": id} if name is None else {"sandbox_id": id, "name": name}
    return await client.post(f"/v1/snapshots{query}", json=body)


def _found(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _paths(settings: Settings) -> Paths:
    return Paths(settings.data_dir)


async def test_what_is_paused_is_on_disk_and_nowhere_else(server: Server, team: Team) -> None:
    paths = _paths(server.settings)
    id = await _create(team.client)
    before = await _get(team.client, id)
    for cycle in range(3):
        await _shell(team.client, id, f"echo {cycle} >> kept")
        assert (await _act(team.client, id, "pause")).json()["status"] == "paused"
        assert _found(paths.run) == set()
        assert _found(paths.paused) == {id}
        resumed = (await _act(team.client, id, "resume")).json()
        assert resumed["started_at"] == resumed["last_active_at"] > before["started_at"]
        await server.plane.reconciler.sweep()
    assert await _shell(team.client, id, "cat kept") == "0\n1\n2\n"
    cycle_events = [
        ("pause", "user"),
        ("paused", "user"),
        ("resume", "user"),
        ("resumed", "user"),
    ]
    assert (await _history(team.client, id))[3:] == cycle_events * 3
    assert (await team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert _found(paths.run) == _found(paths.paused) == set()


async def test_no_connection_to_a_guest_outlives_its_life(restartable: Settings) -> None:
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = SandboxId(await _create(team.client))
        lives = []
        for _ in range(3):
            client = host._sandboxes[id].machine.client
            await _shell(team.client, id, "true")
            kept = list(client._idle)
            assert any(connection.reusable for connection in kept)
            await _act(team.client, id, "pause")
            assert not any(connection.reusable for connection in kept)
            with pytest.raises(GuestGone):
                await client.health()
            await _act(team.client, id, "resume")
            lives.append(client)
        machine = host._sandboxes[id].machine
        lives.append(machine.client)
        await _shell(team.client, id, "true")
        kept = list(machine.client._idle)
        assert any(connection.reusable for connection in kept)
        await machine.initialize_guest("another")
        assert not any(connection.reusable for connection in kept)
        lives.append(machine.client)
        assert len(set(lives)) == 5
        assert len({each._token for each in lives}) == 5, "nor does a token"
        assert await _shell(team.client, id, "echo here") == "here\n"


async def test_a_paused_sandbox_can_be_deleted(server: Server, team: Team) -> None:
    id = await _create(team.client)
    await _act(team.client, id, "pause")
    assert (await team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert _found(_paths(server.settings).paused) == set()
    assert (await _get(team.client, id))["status"] == "stopped"


async def test_one_of_several_pauses_and_resumes_wins(server: Server, team: Team) -> None:
    id = await _create(team.client)
    for action in ("pause", "resume"):
        answers = await asyncio.gather(
            *(team.client.post(f"/v1/sandboxes/{id}/{action}") for _ in range(3))
        )
        assert sorted(answer.status_code for answer in answers) == [200, 409, 409]
    assert await _shell(team.client, id, "echo here") == "here\n"


async def test_a_new_server_finds_what_runs_and_what_is_stored(restartable: Settings) -> None:
    async with serve_processes(restartable) as (server, _):
        team = await server.team()
        running, paused = await _create(team.client), await _create(team.client)
        for id in (running, paused):
            await _shell(team.client, id, f"echo {id} > name")
        await _act(team.client, paused, "pause")
    for _ in range(2):
        async with serve_processes(restartable) as (server, _):
            await server.plane.reconciler.sweep()
            client = server.client({"X-API-Key": team.key})
            assert (await _get(client, running))["status"] == "running"
            assert (await _get(client, paused))["status"] == "paused"
            assert await _shell(client, running, "cat name") == f"{running}\n"
            await _act(client, paused, "resume")
            assert await _shell(client, paused, "cat name") == f"{paused}\n"
            await _act(client, paused, "pause")
            for id in (running, paused):
                actors = {actor for _, actor in await _history(client, id)}
                assert actors == {"user"}


class _Held:
    """Holds the driver's pause back at its end, as a slow disk does."""

    def __init__(self) -> None:
        self.arrived, self.opened = asyncio.Event(), asyncio.Event()
        self._pause = FakeDriver.pause

    async def __call__(
        self, driver: FakeDriver, process: Process, spec: MachineSpec, into: Path
    ) -> dict[str, FileDigest]:
        files = await self._pause(driver, process, spec, into)
        self.arrived.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            await driver.unpause(process, spec)
            raise
        return files


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> _Held:
    held = _Held()

    async def pause(
        driver: FakeDriver, process: Process, spec: MachineSpec, into: Path
    ) -> dict[str, FileDigest]:
        return await held(driver, process, spec, into)

    monkeypatch.setattr(FakeDriver, "pause", pause)
    return held


@pytest.mark.parametrize("action", ["pause", "snapshot"])
async def test_a_stop_in_the_middle_leaves_the_sandbox_running(
    restartable: Settings, held: _Held, action: str
) -> None:
    held.opened.set()
    short = restartable.model_copy(update={"shutdown_grace_sec": 0.05})
    async with serve_processes(short) as (server, _):
        team = await server.team()
        id = await _create(team.client)
        await _shell(team.client, id, "echo here > kept")
        held.arrived.clear()
        held.opened.clear()
        if action == "pause":
            server.start(team.client.post(f"/v1/sandboxes/{id}/pause"))
        else:
            server.start(_snapshot(team.client, id, "mine"))
        await held.arrived.wait()
        await server.plane.operations.close(0)
    held.opened.set()
    async with serve_processes(restartable) as (server, _):
        await server.plane.reconciler.sweep()
        client = server.client({"X-API-Key": team.key})
        assert (await _get(client, id))["status"] == "running"
        (event, *_) = (await client.get(f"/v1/sandboxes/{id}/events")).json()
        assert (event["event"], event["actor"]) == (f"{action}_failed", "reconciler")
        assert await _shell(client, id, "cat kept") == "here\n"
        if action == "snapshot":
            assert (await _snapshot(client, id, "mine")).status_code == 201
        else:
            await _act(client, id, "pause")
            await _act(client, id, "resume")
            assert await _shell(client, id, "cat kept") == "here\n"


async def test_a_pause_whose_answer_was_lost(
    restartable: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = await _create(team.client)
        _lose_answer(monkeypatch, host, "pause")
        pausing = server.start(team.client.post(f"/v1/sandboxes/{id}/pause"))
        await asyncio.wait([pausing])
    async with serve_processes(restartable) as (server, _):
        await server.plane.reconciler.sweep()
        client = server.client({"X-API-Key": team.key})
        assert (await _get(client, id))["status"] == "paused"
        assert (await _history(client, id))[-1] == ("paused", "reconciler")
        await _act(client, id, "resume")


async def test_a_resume_whose_answer_was_lost(
    restartable: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = await _create(team.client)
        await _act(team.client, id, "pause")
        _lose_answer(monkeypatch, host, "resume")
        resuming = server.start(team.client.post(f"/v1/sandboxes/{id}/resume"))
        await asyncio.wait([resuming])
    async with serve_processes(restartable) as (server, _):
        await server.plane.reconciler.sweep()
        client = server.client({"X-API-Key": team.key})
        sandbox = await _get(client, id)
        assert sandbox["status"] == "running"
        assert sandbox["guest_ip"]
        assert await _shell(client, id, "echo here") == "here\n"


def _lose_answer(monkeypatch: pytest.MonkeyPatch, host: HostAgent, call: str) -> None:
    """Let a call of the host do its work and the caller never learn of it."""
    work = getattr(host, call)

    async def lost(*arguments: object, **options: object) -> None:
        await work(*arguments, **options)
        raise asyncio.CancelledError

    monkeypatch.setattr(host, call, lost)


async def test_a_sandbox_becomes_a_template_and_many_sandboxes(server: Server, team: Team) -> None:
    paths = _paths(server.settings)
    source = await _create(team.client)
    await _shell(team.client, source, "echo template > kept")
    made = await _snapshot(team.client, source, "mine")
    assert made.status_code == 201, made.text
    assert made.json()["type"] == "snapshot"
    assert made.json()["size_bytes"] > 0
    assert _found(paths.run) == _found(paths.paused) == set()
    sandbox = await _get(team.client, source)
    assert (sandbox["status"], sandbox["reason"]) == ("stopped", "snapshotted")
    listed = (await team.client.get("/v1/snapshots?type=snapshot")).json()
    assert listed == [made.json()]
    assert [each["name"] for each in (await team.client.get("/v1/snapshots?type=base")).json()] == [
        "minimal"
    ]
    copies = [await _create(team.client, template="mine") for _ in range(2)]
    for number, copy in enumerate(copies):
        assert await _shell(team.client, copy, f"cat kept; echo {number} > kept") == "template\n"
    assert [await _shell(team.client, copy, "cat kept") for copy in copies] == ["0\n", "1\n"]


async def test_an_image_lives_as_long_as_it_is_needed(server: Server, team: Team) -> None:
    paths = _paths(server.settings)
    source = await _create(team.client)
    before = _found(paths.images)
    await _shell(team.client, source, "echo template > kept")
    assert (await _snapshot(team.client, source, "mine")).status_code == 201
    (image,) = _found(paths.images) - before
    paused, running = [await _create(team.client, template="mine") for _ in range(2)]
    await _act(team.client, paused, "pause")
    assert (await team.client.delete("/v1/snapshots/mine")).status_code == 204
    answer = await team.client.post("/v1/sandboxes", json={"template": "mine"})
    assert answer.status_code == 404
    await _act(team.client, paused, "resume")
    await _act(team.client, running, "pause")
    for id in (paused, running):
        assert image in _found(paths.images)
        assert (await team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert _found(paths.images) == before


async def test_an_overwritten_image_goes_with_its_last_sandbox(server: Server, team: Team) -> None:
    paths = _paths(server.settings)
    first, second = await _create(team.client), await _create(team.client)
    before = _found(paths.images)
    for number, id in enumerate((first, second)):
        await _shell(team.client, id, f"echo {number} > kept")
    assert (await _snapshot(team.client, first, "mine")).status_code == 201
    (image,) = _found(paths.images) - before
    old = await _create(team.client, template="mine")
    taken = await _snapshot(team.client, second, "mine")
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "already_exists")
    assert await _shell(team.client, second, "cat kept") == "1\n"
    assert (await _snapshot(team.client, second, "mine", "?overwrite=true")).status_code == 201
    new = await _create(team.client, template="mine")
    assert await _shell(team.client, old, "cat kept") == "0\n"
    assert await _shell(team.client, new, "cat kept") == "1\n"
    assert image in _found(paths.images)
    assert (await team.client.delete(f"/v1/sandboxes/{old}")).status_code == 204
    assert image not in _found(paths.images)


async def test_a_snapshot_cannot_take_the_name_of_a_template(server: Server, team: Team) -> None:
    id = await _create(team.client)
    for name, query in (("minimal", ""), ("minimal", "?overwrite=true")):
        answer = await _snapshot(team.client, id, name, query)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "already_exists")
    await _act(team.client, id, "pause")
    assert (await _snapshot(team.client, id)).status_code == 409
    await _act(team.client, id, "resume")
    made = await _snapshot(team.client, id)
    assert made.status_code == 201
    assert len(made.json()["name"]) == len("template-") + 8
    stranger = await server.team()
    assert [each["name"] for each in (await stranger.client.get("/v1/snapshots")).json()] == [
        "minimal"
    ]
    for method, path in (("GET", "?type=other"), ("DELETE", "/minimal"), ("DELETE", "/none")):
        answer = await team.client.request(method, f"/v1/snapshots{path}")
        assert answer.status_code == {"?type=other": 400, "/minimal": 403, "/none": 404}[path]


async def test_a_failed_snapshot_on_the_real_host_changes_nothing(
    server: Server, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await _create(team.client)
    before = _found(_paths(server.settings).images)
    await _shell(team.client, id, "echo here > kept")
    with monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "pause", _full)
        answer = await _snapshot(team.client, id, "mine")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "agent_error")
    assert _found(_paths(server.settings).images) == before
    assert await _shell(team.client, id, "cat kept") == "here\n"
    assert (await _snapshot(team.client, id, "mine")).status_code == 201


async def _full(*_: object) -> dict[str, FileDigest]:
    raise HostFailure("The disk is full")


async def test_a_snapshot_whose_answer_was_lost(
    restartable: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = await _create(team.client)
        await _shell(team.client, id, "echo template > kept")
        _lose_answer(monkeypatch, host, "snapshot")
        making = server.start(_snapshot(team.client, id, "mine"))
        await asyncio.wait([making])
    async with serve_processes(restartable) as (server, _):
        await server.plane.reconciler.sweep()
        client = server.client({"X-API-Key": team.key})
        sandbox = await _get(client, id)
        assert (sandbox["status"], sandbox["reason"]) == ("stopped", "snapshotted")
        (template,) = (await client.get("/v1/snapshots?type=snapshot")).json()
        assert template["size_bytes"] > 0
        copy = await _create(client, template="mine")
        assert await _shell(client, copy, "cat kept") == "template\n"


async def test_a_snapshot_asked_for_again_after_a_restart(restartable: Settings) -> None:
    image_id, operation_id = new_image_id(), new_operation_id()
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = SandboxId(await _create(team.client))
        first = await host.snapshot(id, operation_id, image_id)
        assert await host.snapshot(id, operation_id, image_id) == first
        other = SandboxId(await _create(team.client))
        await host.snapshot(other, new_operation_id(), image_id)
        assert await host.sandboxes() == []
    async with serve_processes(restartable) as (_, host):
        assert await host.snapshot(id, operation_id, image_id) == first
        assert await host.sandboxes() == []
        await host.remove_image(image_id)
        await host.remove_image(image_id)
        await host.remove_image(new_image_id())
        with pytest.raises(NotFound):
            await host.snapshot(id, operation_id, image_id)


@pytest.fixture
async def timed(
    settings: Settings, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    """A server that pauses what is idle only when the test says so, by the test's clock."""

    async def dormant(_: AutoPause) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(AutoPause, "run", dormant)
    async with serve_processes(settings, clock) as (server, host):
        yield server
        for report in await host.sandboxes():
            await host.destroy(report.sandbox_id, new_operation_id())


async def test_a_command_that_runs_keeps_a_sandbox_awake(timed: Server, clock: FakeClock) -> None:
    client = (await timed.team()).client
    id = await _create(client, timeout_sec=_TIMEOUT)
    await _shell(client, id, "mkfifo begun go")
    running = timed.start(_shell(client, id, "echo > begun; cat go"))
    await _shell(client, id, "cat begun")
    for _ in range(3):
        clock.advance(10 * _TIMEOUT)
        await timed.plane.autopause.sweep()
        assert (await _get(client, id))["status"] == "running"
    await _shell(client, id, "echo on > go")
    assert await running == "on\n"
    clock.advance(_TIMEOUT - 1)
    await timed.plane.autopause.sweep()
    assert (await _get(client, id))["status"] == "running"
    clock.advance(1)
    await timed.plane.autopause.sweep()
    assert (await _get(client, id))["status"] == "paused"
    assert (await _history(client, id))[-1] == ("paused", "auto")
    await timed.plane.reconciler.sweep()
    await _act(client, id, "resume")
    await timed.plane.autopause.sweep()
    assert (await _get(client, id))["status"] == "running"


async def test_an_auto_pause_that_fails_is_tried_again_later(
    timed: Server, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = (await timed.team()).client
    id = await _create(client, timeout_sec=_TIMEOUT)
    clock.advance(_TIMEOUT)
    attempts: list[None] = []
    with monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "pause", staticmethod(partial(_counted, attempts)))
        for _ in range(16):
            await timed.plane.autopause.sweep()
            clock.advance(1)
    assert len(attempts) == 3
    assert (await _get(client, id))["status"] == "running"
    (event, *_) = (await client.get(f"/v1/sandboxes/{id}/events")).json()
    assert (event["event"], event["actor"]) == ("pause_failed", "auto")
    assert event["reason"] == "The disk is full"
    await timed.plane.reconciler.sweep()
    clock.advance(20)
    await timed.plane.autopause.sweep()
    assert (await _get(client, id))["status"] == "paused"


async def _counted(attempts: list[None], *arguments: object) -> dict[str, FileDigest]:
    attempts.append(None)
    return await _full(*arguments)
