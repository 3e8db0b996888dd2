"""An engine that the operator retires: what it stored is rebooted, and its history says so.

The host agent is the real one with processes for machines, which get engines of a few bytes.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.api_server import Server, Team, serve_processes
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.engines import Engine, EngineStore
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.ids import SandboxId, new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Egress

pytestmark = pytest.mark.parametrize("database_url", [None])
_RETIRED = "fake 1, which stored it, was retired by the operator of this host"
_WHY = f"rebooted: {_RETIRED}; its files are kept, its processes are gone"


class Rig:
    """A server whose engine can be replaced."""

    def __init__(
        self, server: Server, host: HostAgent, team: Team, patch: pytest.MonkeyPatch, source: Path
    ) -> None:
        self.server, self.host, self.team = server, host, team
        self._patch, self._source = patch, source
        self._usual = host._driver.capabilities
        self.use(b"old")

    def use(self, content: bytes) -> Engine:
        """Start machines with another engine from now on."""
        self._source.write_bytes(content)
        self.engine = self.host._context.engines.keep("fake", "1", {"program": self._source})
        capabilities = replace(self._usual, engine=self.engine.digest)
        self._patch.setattr(FakeDriver, "capabilities", capabilities)
        return self.engine

    async def paused(self) -> SandboxId:
        """A stored sandbox with a file."""
        answer = await self.team.client.post("/v1/sandboxes", json={})
        id = SandboxId(answer.json()["id"])
        body = {"cmd": "/bin/sh", "args": ["-c", "echo here > kept"]}
        assert (await self.team.client.post(f"/v1/sandboxes/{id}/exec", json=body)).is_success
        await self.pause(id)
        return id

    async def pause(self, id: SandboxId) -> None:
        assert (await self.team.client.post(f"/v1/sandboxes/{id}/pause")).is_success

    async def resume(self, id: SandboxId) -> int:
        return (await self.team.client.post(f"/v1/sandboxes/{id}/resume")).status_code

    async def kept(self, id: SandboxId) -> bool:
        body = {"cmd": "cat", "args": ["kept"]}
        answer = await self.team.client.post(f"/v1/sandboxes/{id}/exec", json=body)
        return bool(answer.json()["stdout"] == "here\n")

    async def last_event(self, id: SandboxId) -> tuple[str, str]:
        found = (await self.team.client.get(f"/v1/sandboxes/{id}/events")).json()[0]
        return found["event"], found.get("reason", "")

    def retire(self, engine: Engine) -> None:
        """As the operator's command does, in another process."""
        EngineStore(self.host._paths).retire(engine.digest)


@pytest.fixture
async def rig(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Rig]:
    async with serve_processes(settings) as (server, host):
        yield Rig(server, host, await server.team(), monkeypatch, tmp_path / "program")
        for report in await host.sandboxes():
            await host.destroy(report.sandbox_id, new_operation_id())


async def test_a_retired_engine_reboots_what_it_stored_once(rig: Rig) -> None:
    old = rig.engine
    id = await rig.paused()
    rig.use(b"new")
    rig.retire(old)
    assert await rig.resume(id) == 200
    assert await rig.last_event(id) == ("resumed", _WHY)
    assert await rig.kept(id)
    stored = rig.host._sandboxes[id].machine.record
    assert (stored.engine, stored.rebooted) == (rig.engine.digest, _RETIRED)
    for _ in range(2):
        await rig.pause(id)
        assert await rig.resume(id) == 200
        assert await rig.last_event(id) == ("resumed", "")


async def test_an_engine_that_is_kept_continues_what_it_stored(rig: Rig) -> None:
    old = rig.engine
    id = await rig.paused()
    rig.use(b"new")
    for _ in range(2):
        assert await rig.resume(id) == 200
        assert rig.host._sandboxes[id].machine.record.engine == old.digest
        assert await rig.last_event(id) == ("resumed", "")
        await rig.pause(id)


async def test_a_reboot_whose_resume_fails_is_told_by_the_next(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rig.engine
    id = await rig.paused()
    rig.use(b"new")
    rig.retire(old)
    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "resume", _fails)
        assert await rig.resume(id) == 502
    assert await rig.resume(id) == 200
    assert await rig.last_event(id) == ("resumed", _WHY)


async def _fails(*_: object) -> None:
    raise HostFailure("The sandbox did not answer in time")


async def test_a_reboot_whose_answer_is_lost_is_told_by_the_reconciler(rig: Rig) -> None:
    old = rig.engine
    id = await rig.paused()
    rig.use(b"new")
    rig.retire(old)
    placement = await rig.host.resume(id, new_operation_id(), Egress())
    assert placement.rebooted == _RETIRED
    await rig.server.plane.reconciler.sweep()
    assert await rig.last_event(id) == ("resumed", f"the host had it running; {_WHY}")


async def test_an_engine_that_is_gone_is_told_with_the_way_out(rig: Rig) -> None:
    """Nobody has retired it, so its owner decides."""
    old = rig.engine
    id = await rig.paused()
    rig.use(b"new")
    await asyncio.to_thread(rig.host._context.engines.collect, {rig.engine.digest})
    assert await rig.resume(id) == 502
    event, reason = await rig.last_event(id)
    assert event == "resume_failed"
    assert f"(fake 1, {old.digest[:12]}) is not on this host" in reason
    assert "wrenn sandbox resume --reboot" in reason
    answer = await rig.team.client.post(f"/v1/sandboxes/{id}/resume", json={"memory": False})
    assert answer.status_code == 200
    assert await rig.kept(id)


async def _snapshot(rig: Rig) -> None:
    """A snapshot `kept` of a sandbox with a file, whose engine is retired then."""
    old = rig.engine
    id = await rig.paused()
    assert await rig.resume(id) == 200
    body = {"sandbox_id": id, "name": "kept"}
    assert (await rig.team.client.post("/v1/snapshots", json=body)).status_code == 201
    rig.use(b"new")
    rig.retire(old)


async def test_a_snapshot_of_a_retired_engine_is_started_from_its_disk(rig: Rig) -> None:
    await _snapshot(rig)
    answer = await rig.team.client.post("/v1/sandboxes", json={"template": "kept"})
    assert answer.status_code == 201, answer.text
    id = SandboxId(answer.json()["id"])
    assert await rig.last_event(id) == ("started", _WHY)
    assert rig.host._sandboxes[id].machine.record.engine == rig.engine.digest
    await rig.pause(id)
    assert await rig.resume(id) == 200
    assert await rig.last_event(id) == ("resumed", "")
    assert (await rig.team.client.delete("/v1/snapshots/kept")).status_code == 204
    await rig.server.plane.reconciler.sweep()
    assert (await rig.team.client.get(f"/v1/sandboxes/{id}")).json()["status"] == "running"
    engines = await asyncio.to_thread(rig.host._context.engines.all)
    assert [each.digest for each in engines] == [rig.engine.digest], "nothing needs the note"
    assert (await rig.team.client.delete(f"/v1/sandboxes/{id}")).status_code == 204
    assert not any(rig.host._paths.paused.iterdir())


async def test_a_snapshot_that_does_not_start_from_its_disk_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _snapshot(rig)
    images = {each.name for each in rig.host._paths.images.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "initialize_guest", _fails)
        answer = await rig.team.client.post("/v1/sandboxes", json={"template": "kept"})
    assert answer.status_code == 502
    assert "did not start from its disk" in answer.json()["error"]["message"]
    assert not any(rig.host._paths.paused.iterdir())
    assert not any(rig.host._paths.run.iterdir())
    assert {each.name for each in rig.host._paths.images.iterdir()} == images
    assert rig.host._sandboxes == {}
