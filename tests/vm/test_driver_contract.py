"""What every driver does, whatever it drives."""

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.vm.stand import Stand, standing
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.backends import Backends
from wrenn_sandbox.host.guest import RunningGuest
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.process import own_memory
from wrenn_sandbox.host.vmm.base import Driver, Process
from wrenn_sandbox.wire.messages import Command

_END_SEC = 60.0


async def _waiting(driver: Driver, process: Process) -> "asyncio.Task[str]":
    """A task that waits for the machine's end, and has begun to."""
    task = asyncio.create_task(driver.wait(process))
    await asyncio.sleep(0)
    return task


def _exists(process: Process) -> bool:
    try:
        return bool(Path(f"/proc/{process.pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.vm)])
async def stand(request: pytest.FixtureRequest, images: Path) -> AsyncIterator[Stand]:
    async with standing(images, request.param) as stand:
        yield stand


async def test_a_machine_from_its_start_to_its_end(stand: Stand) -> None:
    capabilities = stand.driver.capabilities
    assert capabilities.version
    assert capabilities.name == stand.settings.driver
    async with stand.machine() as (spec, process, client):
        result = await RunningGuest(client).exec(
            Command(cmd="echo", args=("hello",)), timeout=30, output_limit=1024
        )
        assert result.stdout == b"hello\n"
        assert own_memory(process.pid) > 0
        ended = await _waiting(stand.driver, process)
        await stand.driver.kill(process)
        assert await asyncio.wait_for(ended, 5)
        assert not _exists(process)
        await stand.driver.kill(process)
        with pytest.raises(OSError):
            await connect_guest(stand.equipment.namespaces, spec.slot)


async def test_a_machine_that_dies_by_itself(stand: Stand) -> None:
    async with stand.machine() as (_, process, _client):
        os.kill(process.pid, 9)
        assert "9" in await asyncio.wait_for(stand.driver.wait(process), 5)
        assert isinstance(await stand.driver.diagnosis(process), str)


async def test_another_driver_object_adopts_it(stand: Stand) -> None:
    async with stand.machine() as (spec, process, client):
        await stand.equipment.close()
        assert _exists(process)
        other = await Backends.of(stand.settings, stand.paths)
        try:
            impostor = Process(process.pid, process.start_time + 1)
            assert not await other.driver.adopt(impostor, spec)
            assert await other.driver.adopt(process, spec)
            await client.health()
            ended = await _waiting(other.driver, process)
            await other.driver.kill(process)
            assert await asyncio.wait_for(ended, 5)
            assert not await other.driver.adopt(process, spec)
        finally:
            await other.close()
        assert not _exists(process)


@pytest.mark.parametrize("stand", [pytest.param("qemu", marks=pytest.mark.vm)], indirect=True)
async def test_a_machine_that_cannot_start_says_why(stand: Stand) -> None:
    async with stand.spec() as spec:
        broken = dataclasses.replace(spec, kernel=spec.files.directory / "missing")
        with pytest.raises(HostFailure) as caught:
            await stand.driver.boot(broken)
        assert "missing" not in str(caught.value)
        assert "missing" in (caught.value.detail or "")


@pytest.mark.parametrize("stand", [pytest.param("qemu", marks=pytest.mark.vm)], indirect=True)
async def test_the_console_of_a_guest_that_panics_is_kept(stand: Stand) -> None:
    async with stand.spec() as spec:
        garbage = spec.files.directory / "garbage"
        garbage.write_bytes(bytes(4096))
        os.chown(garbage, spec.slot.uid, spec.slot.uid)
        process = await stand.driver.boot(dataclasses.replace(spec, initrd=garbage))
        try:
            reason = await asyncio.wait_for(stand.driver.wait(process), _END_SEC)
            assert reason
            assert "panic" in (await stand.driver.diagnosis(process)).lower()
        finally:
            await stand.driver.kill(process)
