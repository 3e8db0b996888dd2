"""A host agent on the fake driver and one sandbox of it."""

import asyncio
import os

from support.qcow2 import qemu_io
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.ids import ImageId, SandboxId, new_operation_id, new_sandbox_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import CreateSandbox, Egress


class Stand:
    """A host and one sandbox of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.id: SandboxId = new_sandbox_id()
        self.host: HostAgent

    async def start(self) -> None:
        self.host = await HostAgent.start(self.settings)

    async def create(self, memory_mb: int = 256) -> None:
        template = await self.host.template_image("minimal")
        await self.host.create(
            CreateSandbox(
                sandbox_id=self.id,
                operation_id=new_operation_id(),
                image_id=template.image_id,
                vcpus=1,
                memory_mb=memory_mb,
            )
        )

    @property
    def sandbox(self) -> Sandbox:
        return self.host._sandboxes[self.id]

    @property
    def manifest(self) -> PausedSandbox:
        assert self.sandbox.stored is not None
        return self.sandbox.stored

    async def pause(self) -> None:
        await self.host.pause(self.id, new_operation_id())

    async def resume(self) -> None:
        async with asyncio.timeout(patience(20)):
            await self.host.resume(self.id, new_operation_id(), Egress())

    async def settled(self) -> None:
        async with asyncio.timeout(patience(20)):
            await self.host._housekeeper.settled()

    def write(self, *commands: str) -> None:
        """What the guest would do to its disk."""
        qemu_io(self.sandbox.machine.spec.files.overlay, *commands)

    def image(self, image_id: ImageId) -> Manifest:
        return self.host._store.open(image_id)

    def layers(self) -> list[int]:
        """The generations below the sandbox's newest disk layer."""
        return list(self.sandbox.layers)

    def generations(self) -> set[int]:
        directory = self.settings.data_dir / "paused" / self.id
        return {int(name) for name in os.listdir(directory)} if directory.exists() else set()

    def images(self) -> set[str]:
        return set(os.listdir(self.settings.data_dir / "images"))
