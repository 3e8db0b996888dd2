"""Resuming without memory: the stored disk is started from its kernel, and nothing is lost by it.

The host agent is the real one with processes for machines; the double shows what the control plane
makes of it.
"""

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from support.api_server import Server, Team, serve_processes
from support.host_double import HostDouble
from wrenn_sandbox.errors import HostFailure, NoCapacity
from wrenn_sandbox.host import admission, agent, paused
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.images.manifest import FileDigest
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.host.vmm.base import MachineSpec, Process
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.ids import SandboxId, new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import EventKind

pytestmark = pytest.mark.parametrize("database_url", [None])
_WITHOUT = {"memory": False}
_WAY_OUT = "wrenn sandbox resume --reboot"


@pytest.fixture
async def rig(settings: Settings) -> AsyncIterator[tuple[Server, HostAgent, Team]]:
    async with serve_processes(settings) as (server, host):
        yield server, host, await server.team()
        for report in await host.sandboxes():
            await host.destroy(report.sandbox_id, new_operation_id())
        assert _found(Paths(settings.data_dir).paused) == set()


async def _create(team: Team, **body: object) -> SandboxId:
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return SandboxId(answer.json()["id"])


async def _shell(team: Team, id: str, script: str) -> str:
    body = {"cmd": "sh", "args": ["-c", script]}
    answer = await team.client.post(f"/v1/sandboxes/{id}/exec", json=body)
    assert answer.json()["exit_code"] == 0, answer.text
    return str(answer.json()["stdout"])


async def _pause(team: Team, id: str) -> None:
    assert (await team.client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200


async def _resume(team: Team, id: str, body: object = None) -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/resume", json=body)


async def _reboot(team: Team, id: str) -> None:
    answer = await _resume(team, id, _WITHOUT)
    assert (answer.status_code, answer.json()["status"]) == (200, "running")


async def _history(team: Team, id: str) -> list[tuple[str, str]]:
    events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    return [(each["event"], each.get("reason", "")) for each in reversed(events)]


def _message(answer: httpx2.Response) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "agent_error")
    return str(answer.json()["error"]["message"])


def _found(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _stored(host: HostAgent, id: SandboxId) -> PausedSandbox:
    manifest = paused.newest(host._paths, id)
    assert manifest is not None
    return manifest


async def test_files_are_kept_and_the_history_says_so(user: Team) -> None:
    id = await _create(user)
    await _pause(user, id)
    await _reboot(user, id)
    assert (await _history(user, id))[-2:] == [
        ("resume", "to be rebooted: a resume without memory was asked for"),
        ("resumed", "rebooted: resumed without memory, as was asked for"),
    ]
    shown = (await user.client.get(f"/v1/sandboxes/{id}")).json()
    assert "reason" not in shown


async def test_nothing_but_false_reboots(user: Team, host: HostDouble) -> None:
    id = await _create(user)
    for body in (None, {}, {"memory": True}, {"other": False}):
        await _pause(user, id)
        assert (await _resume(user, id, body)).status_code == 200
    await _pause(user, id)
    bodies: tuple[object, ...] = ({"memory": "no"}, {"memory": None}, {"memory": 0}, [])
    for wrong in bodies:
        answer = await _resume(user, id, wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert ("reboot", id) not in host.calls
    await _reboot(user, id)
    assert ("reboot", id) in host.calls


async def test_a_running_sandbox_is_not_rebooted(user: Team, host: HostDouble) -> None:
    id = await _create(user)
    answer = await _resume(user, id, _WITHOUT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    assert ("reboot", id) not in host.calls


async def test_another_teams_sandbox_cannot_be_rebooted(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await _create(user)
    await _pause(user, id)
    stranger = await faulty.team()
    assert (await _resume(stranger, id, _WITHOUT)).status_code == 404
    assert ("reboot", id) not in host.calls


async def test_a_reboot_that_fails_leaves_it_paused(user: Team, host: HostDouble) -> None:
    id = await _create(user)
    await _pause(user, id)
    host.fail["reboot"] = HostFailure("The sandbox did not start from its disk")
    assert "did not start" in _message(await _resume(user, id, _WITHOUT))
    shown = (await user.client.get(f"/v1/sandboxes/{id}")).json()
    assert (shown["status"], shown["reason"]) == (
        "paused",
        "The sandbox did not start from its disk",
    )


async def test_a_rebooted_sandbox_has_its_files_and_goes_on_as_any(
    rig: tuple[Server, HostAgent, Team],
) -> None:
    server, host, team = rig
    paths = host._paths
    images = _found(paths.images)
    id = await _create(team, vcpus=1, memory_mb=256)
    for number in range(3):
        await _shell(team, id, f"echo {number} >> kept")
        await _pause(team, id)
        old = _stored(host, id)
        await _reboot(team, id)
        assert host._sandboxes[id].memory_mb == old.machine.memory_mb == 256
        assert await _shell(team, id, "cat kept") == "".join(f"{n}\n" for n in range(number + 1))
        await _pause(team, id)
        new = _stored(host, id)
        assert new.image_id != old.image_id
        image = host._store.open(new.image_id)
        assert image.private
        assert not host._store.open(image.base_image_id or image.image_id).private
        assert len(_found(paths.images) - images) == 2, "a variant and one private image"
        assert (await _resume(team, id)).status_code == 200
        assert _found(paths.run) == {host._sandboxes[id].machine.record.machine_id}
        await server.plane.reconciler.sweep()
    assert (await team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert _found(paths.run) == _found(paths.paused) == set()
    assert len(_found(paths.images) - images) == 1


async def test_a_sandbox_of_a_snapshot_reboots_over_its_disk(
    rig: tuple[Server, HostAgent, Team],
) -> None:
    _, host, team = rig
    source = await _create(team)
    await _shell(team, source, "echo template > kept")
    body = {"sandbox_id": source, "name": "mine"}
    assert (await team.client.post("/v1/snapshots", json=body)).status_code == 201
    id = await _create(team, template="mine")
    await _shell(team, id, "echo own >> kept")
    await _pause(team, id)
    assert (await team.client.delete("/v1/snapshots/mine")).status_code == 204
    await _reboot(team, id)
    assert await _shell(team, id, "cat kept") == "template\nown\n"
    await _pause(team, id)
    base = host._store.open(_stored(host, id).image_id).base_image_id
    assert base is not None
    assert host._store.open(base).base_image_id == host._store.resolve("minimal").image_id
    again = {"sandbox_id": id, "name": "again"}
    assert (await _resume(team, id)).status_code == 200
    assert (await team.client.post("/v1/snapshots", json=again)).status_code == 201
    assert await _shell(team, await _create(team, template="again"), "cat kept") == (
        "template\nown\n"
    )


async def test_only_the_newest_state_is_left_behind_a_reboot(
    rig: tuple[Server, HostAgent, Team],
) -> None:
    """Nothing that is older may come back when its machine is gone."""
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    before = _stored(host, id)
    await _reboot(team, id)
    assert paused.newest(host._paths, id) is None
    directory = host._paths.stored(id)
    assert {path.name for path in directory.rglob("*") if path.is_file()} == {"disk"}
    await _pause(team, id)
    assert _stored(host, id).layers == (*before.layers, before.generation, before.generation + 1)


async def test_what_does_not_fit_the_host_any_more(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host, team = rig
    id = await _create(team)
    await _shell(team, id, "echo here > kept")
    await _pause(team, id)
    usual = host._driver.capabilities
    newer = replace(usual, version="2", cpu_model="another", accelerator="another")
    monkeypatch.setattr(FakeDriver, "capabilities", newer)
    message = _message(await _resume(team, id))
    assert "version of the machine monitor (1, here 2)" in message
    assert _WAY_OUT in message
    assert (await _history(team, id))[-1] == ("resume_failed", message)
    await _reboot(team, id)
    assert await _shell(team, id, "cat kept") == "here\n"
    await _pause(team, id)
    assert _stored(host, id).machine.vmm_version == "2"
    assert (await _resume(team, id)).status_code == 200


@pytest.mark.parametrize("name", ["vmstate", "memory.idx", "memory.diff"])
async def test_memory_that_is_damaged(rig: tuple[Server, HostAgent, Team], name: str) -> None:
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    path = host._paths.generation(id, _stored(host, id).generation) / name
    with path.open("ab") as file:
        file.write(b"x")
    message = _message(await _resume(team, id))
    assert f"The stored sandbox is damaged: {name}" in message
    assert _WAY_OUT in message


async def test_a_disk_that_is_damaged(rig: tuple[Server, HostAgent, Team]) -> None:
    """There is no way out, so none is named."""
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    before = _stored(host, id)
    disk = host._paths.generation(id, before.generation) / "disk"
    good = disk.read_bytes()
    disk.write_bytes(good[:-1] + b"x")
    for body in (None, _WITHOUT):
        message = _message(await _resume(team, id, body))
        assert "damaged" in message
        assert _WAY_OUT not in message
    assert _stored(host, id) == before
    disk.write_bytes(good)
    assert (await _resume(team, id)).status_code == 200


async def test_a_guest_that_does_not_answer_after_its_resume(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host, team = rig
    id = await _create(team)
    await _shell(team, id, "echo here > kept")
    await _pause(team, id)
    before = _stored(host, id)
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "initialize_guest", _no_answer)
        message = _message(await _resume(team, id))
        assert "did not answer in time" in message
        assert _WAY_OUT in message
        refused = _message(await _resume(team, id, _WITHOUT))
        assert "did not start from its disk" in refused
        assert "stored as it was" in refused
    assert _stored(host, id) == before
    assert _found(host._paths.run) == set()
    assert _found(host._paths.stored(id)) == {str(before.generation)}
    assert (await _resume(team, id)).status_code == 200
    assert await _shell(team, id, "cat kept") == "here\n"


async def _no_answer(*_: object) -> None:
    raise HostFailure("The sandbox did not answer in time")


async def test_a_reboot_without_room_on_the_disk(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    with monkeypatch.context() as patch:
        patch.setattr(admission, "require_disk", _no_room)
        answer = await _resume(team, id, _WITHOUT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_capacity")
    assert host._admission._promised == {}
    await _reboot(team, id)


def _no_room(*_: object, share: float) -> None:
    raise NoCapacity("The host has no disk space left for another sandbox")


async def test_a_failure_while_the_new_state_is_stored(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    before, images = _stored(host, id), _found(host._paths.images)
    with monkeypatch.context() as patch:
        patch.setattr(paused, "commit", _refuse)
        assert "could not complete the operation" in _message(await _resume(team, id, _WITHOUT))
    assert _stored(host, id) == before
    assert _found(host._paths.images) == images
    assert _found(host._paths.run) == set()
    assert _found(host._paths.stored(id)) == {str(before.generation)}
    assert (await _resume(team, id)).status_code == 200


def _refuse(*_: object) -> None:
    raise OSError(5, "Input/output error")


async def test_a_sandbox_that_is_deleted_while_it_is_rebooted(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    images = _found(host._paths.images)
    booting = asyncio.Event()

    async def slow(self: Machine, hostname: str) -> None:
        booting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Machine, "initialize_guest", slow)
    resuming = asyncio.create_task(_resume(team, id, _WITHOUT))
    await booting.wait()
    assert (await team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert (await resuming).status_code == 409
    assert _found(host._paths.run) == _found(host._paths.paused) == set()
    assert _found(host._paths.images) <= images


async def test_the_reboot_of_a_captured_monitors_disk(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the machine wrote while it booted is looked at before it is taken."""
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    before = _stored(host, id)
    usual = FakeDriver.pause

    async def forging(
        self: FakeDriver, process: Process, spec: MachineSpec, into: Path
    ) -> dict[str, object]:
        with spec.files.overlay.open("r+b") as file:
            file.seek(8)
            file.write((104).to_bytes(8, "big") + (11).to_bytes(4, "big"))
        return dict(await usual(self, process, spec, into))

    with monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "pause", forging)
        assert "damaged" in _message(await _resume(team, id, _WITHOUT))
    assert _stored(host, id) == before
    assert (await _resume(team, id)).status_code == 200


async def test_the_machine_that_boots_may_read_the_disks_and_no_later_one(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    disk = host._paths.generation(id, _stored(host, id).generation) / "disk"
    owners: list[int] = []
    usual = FakeDriver.boot

    async def watched(
        self: FakeDriver, spec: MachineSpec, *, record: Path | None = None
    ) -> Process:
        owners.extend((disk.stat().st_gid, spec.slot.uid))
        return await usual(self, spec, record=record)

    with monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "boot", watched)
        patch.setattr(Machine, "initialize_guest", _no_answer)
        await _resume(team, id, _WITHOUT)
    assert owners[0] == owners[1]
    assert disk.stat().st_gid == 0


async def test_a_guest_that_stops_leaves_a_paused_sandbox(
    faulty: Server, user: Team, host: HostDouble
) -> None:
    id = await _create(user)
    await host.exit(id, "the guest stopped (SHUTDOWN guest-reset)", kept=True)
    shown = (await user.client.get(f"/v1/sandboxes/{id}")).json()
    assert (shown["status"], shown["reason"]) == (
        "paused",
        "the guest stopped (SHUTDOWN guest-reset)",
    )
    events = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
    assert [(each["event"], each["actor"]) for each in events[:2]] == [
        ("paused", "host"),
        ("pause", "host"),
    ]
    await faulty.plane.reconciler.sweep()
    await _reboot(user, id)


async def _stopped(host: HostAgent, team: Team, id: SandboxId) -> None:
    """Let a machine end as if its guest had stopped."""
    os.kill(host._sandboxes[id].machine.process.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        [*_, event] = (await host.events("", 0)).events
    assert (event.sandbox_id, event.kind) == (id, EventKind.STOPPED)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that are machines here end as if the guest had stopped."""

    async def stopped(*_: object) -> bool:
        return True

    monkeypatch.setattr(FakeDriver, "stopped", stopped)


@pytest.mark.usefixtures("stopping")
async def test_the_disk_of_a_guest_that_stopped_is_kept_at_the_second_try(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk of the host is no reason to throw a sandbox's away."""
    _, host, team = rig
    id = await _create(team)
    usual, tries = paused.take_disk, []

    def full_at_first(staged: Path, overlay: Path) -> FileDigest:
        tries.append(overlay)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, "no space")
        return usual(staged, overlay)

    monkeypatch.setattr(agent, "_KEEP_AGAIN_SEC", 0.01)
    monkeypatch.setattr(paused, "take_disk", full_at_first)
    await _stopped(host, team, id)
    assert len(tries) == 2
    assert set(_stored(host, id).files) == {"disk"}


@pytest.mark.usefixtures("stopping")
async def test_the_disk_of_a_guest_that_stopped(rig: tuple[Server, HostAgent, Team]) -> None:
    server, host, team = rig
    id = await _create(team)
    await _pause(team, id)
    assert (await _resume(team, id)).status_code == 200
    await _stopped(host, team, id)
    assert _found(host._paths.run) == set()
    manifest = _stored(host, id)
    assert (set(manifest.files), manifest.layers) == ({"disk"}, (1,))
    await server.plane.reconciler.sweep()
    assert (await team.client.get(f"/v1/sandboxes/{id}")).json()["status"] == "paused"
    answer = await _resume(team, id)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    assert "stopped by itself" in answer.json()["error"]["message"]
    assert _WAY_OUT in answer.json()["error"]["message"]
    host._housekeeper.consider(host._sandboxes[id])
    await host._housekeeper.settled()
    assert _stored(host, id) == manifest
    await _reboot(team, id)
    await _pause(team, id)
    assert not _stored(host, id).stopped
    assert (await _resume(team, id)).status_code == 200


@pytest.mark.usefixtures("stopping")
async def test_a_disk_that_cannot_be_kept_goes_with_its_sandbox_alone(
    rig: tuple[Server, HostAgent, Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host, team = rig
    id = await _create(team)
    monkeypatch.setattr(agent, "_KEEP_AGAIN_SEC", 0.01)
    monkeypatch.setattr(paused, "commit", _refuse)
    os.kill(host._sandboxes[id].machine.process.pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    assert _found(host._paths.run) != set()
    assert (await team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert _found(host._paths.run) == _found(host._paths.paused) == set()


@pytest.mark.usefixtures("stopping")
async def test_a_new_server_reboots_a_sandbox_that_stopped_by_itself(restartable: Settings) -> None:
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = await _create(team)
        await _stopped(host, team, id)
    async with serve_processes(restartable) as (server, host):
        await server.plane.reconciler.sweep()
        team.client = server.client({"X-API-Key": team.key})
        assert (await team.client.get(f"/v1/sandboxes/{id}")).json()["status"] == "paused"
        assert (await _resume(team, id)).status_code == 409
        await _reboot(team, id)
