"""What every driver does, whatever it drives."""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from wrenn_sandbox.cli.leftovers import settled
from wrenn_sandbox.cli.workdir import working_directory
from wrenn_sandbox.errors import AgentError, HostFailure
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.disk import overlay
from wrenn_sandbox.host.equipment import Equipment
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.vmm.base import Driver, MachineSpec, Process
from wrenn_sandbox.ids import new_machine_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command

_BOOT_SEC = 60.0


@dataclass
class Stand:
    """A driver with all it needs, on a data directory of its own."""

    settings: Settings
    paths: Paths
    equipment: Equipment

    @property
    def driver(self) -> Driver:
        return self.equipment.driver

    @contextlib.asynccontextmanager
    async def spec(self) -> AsyncIterator[MachineSpec]:
        """A machine to be, with directory, disk layer and slot; machines it becomes are ended."""
        store = ImageStore(self.paths)
        image = store.resolve("minimal")
        boot = store.boot_files(image)
        slot = await self.equipment.slots.acquire()
        files = self.paths.machine(new_machine_id())
        files.directory.mkdir(mode=0o711)
        overlay.create(
            files.overlay,
            backing=store.disk(image),
            backing_format=image.disk_format,
            size=image.disk_mb << 20,
        )
        for path in (files.directory, files.overlay):
            os.chown(path, slot.uid, slot.uid)
        try:
            yield MachineSpec(
                files=files,
                slot=slot,
                vcpus=1,
                memory_mb=256,
                kernel=boot.kernel,
                initrd=boot.initrd,
                kernel_args=boot.kernel_args,
                runtime=boot.runtime,
            )
        finally:
            self.equipment.slots.release(slot)

    @contextlib.asynccontextmanager
    async def machine(self) -> AsyncIterator[tuple[MachineSpec, Process, GuestClient]]:
        """A machine whose agent has answered."""
        async with self.spec() as spec:
            process = await self.driver.boot(spec)
            client = GuestClient(lambda: connect_guest(self.equipment.namespaces, spec.slot), None)
            try:
                await _answered(client)
                yield spec, process, client
            finally:
                client.close()
                await self.driver.kill(process)


async def _answered(client: GuestClient) -> None:
    async with asyncio.timeout(_BOOT_SEC):
        while True:
            try:
                async with asyncio.timeout(1):
                    return await client.health()
            except (AgentError, TimeoutError):
                await asyncio.sleep(0.02)


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
    with working_directory(images, "driver") as data_dir:
        settings = Settings(data_dir=data_dir, driver=request.param, slot_pool_size=1)
        paths = Paths(data_dir)
        equipment = await Equipment.of(settings, paths)
        try:
            await equipment.slots.start()
            yield Stand(settings, paths, equipment)
        finally:
            for pid in journal.processes_of(paths.run):
                os.kill(pid, signal.SIGKILL)
            await equipment.slots.close()
            await equipment.close()
        assert await asyncio.to_thread(settled, data_dir=data_dir) == set()


async def test_a_machine_from_its_start_to_its_end(stand: Stand) -> None:
    capabilities = stand.driver.capabilities
    assert capabilities.version
    assert capabilities.name == stand.settings.driver
    async with stand.machine() as (_, process, client):
        result = await client.exec(
            Command(cmd="echo", args=("hello",)), timeout=30, output_limit=1024
        )
        assert result.stdout == b"hello\n"
        usage = await stand.driver.usage(process)
        assert usage.own_memory >= 0
        assert usage.cpu_seconds >= 0
        ended = await _waiting(stand.driver, process)
        await stand.driver.kill(process)
        assert await asyncio.wait_for(ended, 5)
        assert not _exists(process)
        await stand.driver.kill(process)
        with pytest.raises(AgentError):
            await client.health()


async def test_a_machine_that_dies_by_itself(stand: Stand) -> None:
    async with stand.machine() as (_, process, _client):
        os.kill(process.pid, 9)
        assert "9" in await asyncio.wait_for(stand.driver.wait(process), 5)
        assert isinstance(await stand.driver.diagnosis(process), str)


async def test_another_driver_object_adopts_it(stand: Stand) -> None:
    async with stand.machine() as (spec, process, client):
        await stand.driver.close()
        assert _exists(process)
        other = await Equipment.of(stand.settings, stand.paths)
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
async def test_a_machine_that_can_not_start(stand: Stand) -> None:
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
            reason = await asyncio.wait_for(stand.driver.wait(process), _BOOT_SEC)
            assert reason
            assert "panic" in (await stand.driver.diagnosis(process)).lower()
        finally:
            await stand.driver.kill(process)
