"""A host agent in the test's process, on a data directory of its own, with real VMs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.guest import GuestUnreachable
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.memory import pages
from wrenn_sandbox.host.memory.base_image import SealedMemories
from wrenn_sandbox.ids import (
    ImageId,
    SandboxId,
    new_image_id,
    new_operation_id,
    new_sandbox_id,
)
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.leftovers import settled
from wrenn_sandbox.wire.messages import Command, CreateSandbox, Egress, Phase


class World:
    """A host agent and short words for what it is asked."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.host: HostAgent

    async def start(self) -> None:
        self.host = await HostAgent.start(self.settings)

    async def restart(self) -> None:
        await self.host.close()
        await self.start()

    async def create(self, image: ImageId | None = None) -> SandboxId:
        template = await self.host.template_image("minimal")
        sandbox = new_sandbox_id()
        await self.host.create(
            CreateSandbox(
                sandbox_id=sandbox,
                operation_id=new_operation_id(),
                image_id=image or template.image_id,
                vcpus=1,
                memory_mb=template.memory_mb,
            )
        )
        return sandbox

    async def checkpoint(self, sandbox: SandboxId) -> ImageId:
        image = new_image_id()
        await self.host.checkpoint(sandbox, new_operation_id(), image)
        return image

    async def roll_back(self, sandbox: SandboxId, image: ImageId) -> None:
        await self.host.rollback(sandbox, new_operation_id(), image, Egress())

    async def pause(self, sandbox: SandboxId) -> None:
        await self.host.pause(sandbox, new_operation_id())

    async def resume(self, sandbox: SandboxId) -> None:
        await self.host.resume(sandbox, new_operation_id(), Egress())

    async def destroy(self, *sandboxes: SandboxId) -> None:
        for sandbox in sandboxes:
            await self.host.destroy(sandbox, new_operation_id())

    async def output(self, sandbox: SandboxId, script: str) -> str:
        """Standard output of a shell script that must succeed, stripped."""
        command, limit = Command(cmd="sh", args=("-c", script)), patience(60)
        guest = self.host.guest(sandbox)
        async with asyncio.timeout(3 * limit):
            while True:
                try:
                    result = await guest.exec(command, timeout=limit, output_limit=1 << 16)
                    break
                except GuestUnreachable:  # not even connected: the host is busy
                    await asyncio.sleep(0.1)
        assert result.exit_code == 0, result
        return result.stdout.decode().strip()

    def phase(self, sandbox: SandboxId) -> Phase:
        return self.host._sandboxes[sandbox].phase

    def layers(self, sandbox: SandboxId) -> int:
        return len(self.host._sandboxes[sandbox].layers)

    def pid(self, sandbox: SandboxId) -> int:
        return self.host._sandboxes[sandbox].machine.process.pid

    def image(self, image: ImageId) -> Manifest:
        return self.host._store.open(image)

    def images(self) -> set[str]:
        return {each.name for each in (self.settings.data_dir / "images").iterdir()}

    def own_bytes(self, sandbox: SandboxId) -> int:
        """How much of its guest memory a sandbox does not share."""
        spec = self.host._sandboxes[sandbox].machine.spec
        assert spec.memory is not None
        name = SealedMemories.name(spec.memory)
        mapping = pages.find_mapping(self.pid(sandbox), name, spec.memory_mb << 20)
        return sum(run.size for run in pages.own_pages(mapping))


@asynccontextmanager
async def world_of(images: Path, **values: object) -> AsyncIterator[World]:
    with working_directory(images, "checkpoint") as data_dir:
        settings = Settings.model_validate(
            {"data_dir": data_dir, "hot_pool_size": 0, "slot_pool_size": 2, **values}
        )
        world = World(settings)
        await world.start()
        try:
            yield world
        finally:
            for report in await world.host.sandboxes():
                await world.destroy(report.sandbox_id)
            await world.host.close()
        assert await asyncio.to_thread(settled, data_dir=data_dir) == set()
