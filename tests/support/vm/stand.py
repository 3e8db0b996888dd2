"""A driver with all it needs and no server around it, for tests at the level of machines."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from support.vm.rig import Rig
from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.backends import Backends
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.vmm.base import Driver, MachineSpec, Process
from wrenn_sandbox.ids import new_machine_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.leftovers import settled

_BOOT_SEC = 60.0


@dataclass
class Stand:
    """A driver with all it needs, on a data directory of its own."""

    settings: Settings
    paths: Paths
    equipment: Backends

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
        self.driver.disk_format.create(files.overlay, store.below(image), image.disk_size)
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
                disk_mb=image.disk_mb,
                disks=(store.disk(image),),
            )
        finally:
            self.equipment.slots.release(slot)

    def client(self, spec: MachineSpec) -> GuestClient:
        """Calls to the guest of a machine, which has no token yet."""
        return GuestClient(lambda: connect_guest(self.equipment.namespaces, spec.slot), None)

    @contextlib.asynccontextmanager
    async def machine(self) -> AsyncIterator[tuple[MachineSpec, Process, GuestClient]]:
        """A machine whose agent has answered."""
        async with self.spec() as spec:
            process = await self.driver.boot(spec)
            client = self.client(spec)
            try:
                await answered(client)
                yield spec, process, client
            finally:
                client.close()
                await self.driver.kill(process)


async def answered(client: GuestClient) -> None:
    """Wait for the guest agent."""
    async with asyncio.timeout(patience(_BOOT_SEC)):
        while True:
            try:
                async with asyncio.timeout(patience(1)):
                    return await client.health()
            except (AgentError, TimeoutError):
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def standing(images: Path, driver: str) -> AsyncIterator[Stand]:
    """A stand on a data directory of its own, of which nothing may be left in the end."""
    with working_directory(images, "driver") as data_dir:
        settings = Settings(data_dir=data_dir, driver=driver, slot_pool_size=1)
        paths = Paths(data_dir)
        equipment = await Backends.of(settings, paths)
        try:
            await equipment.slots.start()
            yield Stand(settings, paths, equipment)
        finally:
            for pid in journal.processes_of(paths.run):
                os.kill(pid, signal.SIGKILL)
            await equipment.slots.close()
            await equipment.close()
        assert await asyncio.to_thread(settled, data_dir=data_dir) == set()


def spec_of(rig: Rig, sandbox: str) -> tuple[MachineSpec, tuple[Path, ...]]:
    """The machine of a running sandbox, and the stored layers that its disk builds on."""
    paths = Paths(rig.data_dir)
    store = ImageStore(paths)
    [record] = [each for each in rig.journals() if each.sandbox_id == sandbox]
    image = store.open(record.image_id)
    boot = store.boot_files(image)
    spec = MachineSpec(
        files=paths.machine(record.machine_id),
        slot=record.slot,
        vcpus=record.vcpus,
        memory_mb=record.memory_mb,
        kernel=boot.kernel,
        initrd=boot.initrd,
        kernel_args=boot.kernel_args,
        runtime=boot.runtime,
        disk_mb=image.disk_mb,
        disks=(store.disk(image), store.disk(store.cold(image))),
        memory=store.memory(image),
        engine=record.engine,
    )
    assert record.sandbox_id is not None
    stored = [paths.generation(record.sandbox_id, each) for each in record.layers]
    return spec, tuple(each / "disk" for each in stored)
