"""A machine that ends by itself while a server starts or stops."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import structlog

from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.host.slot import NOTHING
from wrenn_sandbox.ids import ImageId, SandboxId, new_image_id, new_operation_id, new_sandbox_id
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import CreateSandbox, Egress, EventKind


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    values = {"data_dir": tmp_path / "data", "driver": "fake"}
    return Settings.model_validate({**values, "hot_pool_size": 0})


async def created(host: HostAgent, image_id: ImageId) -> SandboxId:
    sandbox_id = new_sandbox_id()
    await host.create(
        CreateSandbox(
            sandbox_id=sandbox_id,
            operation_id=new_operation_id(),
            image_id=image_id,
            vcpus=1,
            memory_mb=256,
        )
    )
    return sandbox_id


async def stored_over_an_image_of_its_own(host: HostAgent, template: ImageId) -> SandboxId:
    """A stored sandbox, which alone needs the image that it was started from."""
    image_id = new_image_id()
    await host.snapshot(await created(host, template), new_operation_id(), image_id)
    sandbox_id = await created(host, image_id)
    await host.pause(sandbox_id, new_operation_id())
    await host.remove_image(image_id)
    return sandbox_id


async def test_no_image_goes_before_all_sandboxes_are_known(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await HostAgent.start(settings)
    [template] = await before.templates()
    kept = await stored_over_an_image_of_its_own(before, template.image_id)
    ending = await created(before, template.image_id)
    pid = before._sandboxes[ending].machine.process.pid
    await before.close()
    start = UserModeSlots.start

    async def start_late(slots: UserModeSlots, keep: Mapping[int, NetworkPolicy] = NOTHING) -> None:
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):  # for what comes of it, should it come now
                await asyncio.Event().wait()
        await start(slots, keep)

    monkeypatch.setattr(UserModeSlots, "start", start_late)
    host = await HostAgent.start(settings)
    try:
        async with asyncio.timeout(20):
            [event] = (await host.events("", 0)).events
            assert (await host.events("of an earlier start", 7)).events == (event,)
            assert (event.sandbox_id, event.kind) == (ending, EventKind.EXITED)
            assert [each.sandbox_id for each in await host.sandboxes()] == [kept]
            assert host._context.slots._used == set()  # type: ignore[attr-defined]
            await host.resume(kept, new_operation_id(), Egress())
    finally:
        await host.destroy(kept, new_operation_id())
        await host.destroy(ending, new_operation_id())
        await host.close()


async def test_a_machine_that_ends_while_the_server_stops(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are let go of, and nobody works on after the end."""
    host = await HostAgent.start(settings)
    [template] = await host.templates()
    ids = [await created(host, template.image_id) for _ in range(3)]
    process = host._sandboxes[ids[1]].machine.process
    detach = Sandbox.detach

    async def detach_late(sandbox: Sandbox) -> None:
        if sandbox.sandbox_id == ids[0]:
            os.kill(process.pid, signal.SIGKILL)
            async with asyncio.timeout(10):
                while ids[1] in host._sandboxes:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.01)
        await detach(sandbox)

    monkeypatch.setattr(Sandbox, "detach", detach_late)
    await host.close()
    assert not host._tasks
    monkeypatch.undo()
    host = await HostAgent.start(settings)
    try:
        assert {each.sandbox_id for each in await host.sandboxes()} == {ids[0], ids[2]}
    finally:
        for each in ids:
            await host.destroy(each, new_operation_id())
        await host.close()
