"""A host agent in this process, and what the figures do with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.memory import pages
from wrenn_sandbox.host.memory.base_image import SealedMemories
from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.variants import Variants
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.ids import ImageId, SandboxId, new_operation_id, new_sandbox_id
from wrenn_sandbox.model.template import Size
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command, CreateSandbox, Egress

TEMPLATE = "minimal"
EXEC_SEC = 60.0
OUTPUT_LIMIT = 64 * 1024
_FILL = """
import os, signal, sys
held = os.urandom(int(sys.argv[1]) << 20)
if os.fork() == 0:
    signal.pause()
"""


@dataclass(frozen=True)
class Rig:
    """A host agent and the template that its sandboxes come from."""

    agent: HostAgent
    context: HostContext
    """The agent's own, for what it does not offer: a cold boot, a look at one machine."""
    cold: Manifest
    warm: Manifest

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Self]:
        """Start an agent on a data directory; its sandboxes are deleted in the end."""
        agent = await HostAgent.start(settings)
        try:
            context = agent._context
            cold = context.store.resolve(TEMPLATE)
            await agent.warm(TEMPLATE)
            warm = await Variants(context).get(cold, Size(cold.vcpus, cold.memory_mb))
            yield cls(agent, context, cold, warm)
        finally:
            for report in await agent.sandboxes():
                await agent.destroy(report.sandbox_id, new_operation_id())
            await agent.close()

    async def settled(self) -> None:
        """Wait until network slots and ready machines are made again in the background."""
        if self.context.settings.hot_pool_size:
            await self.agent._pool.filled()
        slots = self.context.slots
        while isinstance(slots, SlotPool) and (  # noqa: ASYNC110
            slots._doomed or len(slots._idle) < self.context.settings.slot_pool_size
        ):
            await asyncio.sleep(0.01)

    async def create(self, image: ImageId | None = None) -> SandboxId:
        """A running sandbox of the template's own size, or of an image."""
        sandbox = new_sandbox_id()
        await self.agent.create(
            CreateSandbox(
                sandbox_id=sandbox,
                operation_id=new_operation_id(),
                image_id=image or self.cold.image_id,
                vcpus=self.cold.vcpus,
                memory_mb=self.cold.memory_mb,
            )
        )
        return sandbox

    async def destroy(self, sandbox: SandboxId) -> None:
        await self.agent.destroy(sandbox, new_operation_id())

    async def pause(self, sandbox: SandboxId) -> None:
        await self.agent.pause(sandbox, new_operation_id())

    async def resume(self, sandbox: SandboxId) -> None:
        await self.agent.resume(sandbox, new_operation_id(), Egress())

    async def run(self, sandbox: SandboxId, cmd: str, *args: str) -> str:
        """Standard output of a command that must succeed."""
        command = Command(cmd=cmd, args=args)
        guest = self.agent.guest(sandbox)
        result = await guest.exec(command, timeout=EXEC_SEC, output_limit=OUTPUT_LIMIT)
        assert result.exit_code == 0, result
        return result.stdout.decode()

    def machine(self, sandbox: SandboxId) -> Machine:
        """The machine of a running sandbox."""
        return self.agent._sandbox(sandbox).machine

    async def fill(self, sandbox: SandboxId, mb: int) -> None:
        """Leave a process in the guest that holds that many MiB of random data."""
        script = f"exec python3 -c '{_FILL}' {mb} >/dev/null 2>&1"
        await self.run(sandbox, "sh", "-c", script)

    def own_bytes(self, sandbox: SandboxId) -> int:
        """How much of its guest memory the sandbox does not share."""
        machine = self.machine(sandbox)
        return own_bytes(machine.process.pid, machine.spec)


def own_bytes(pid: int, spec: MachineSpec) -> int:
    """Bytes of guest memory that are this process's own, by its page map."""
    return sum(run.size for run in pages.own_pages(guest_memory(pid, spec)))


def guest_memory(pid: int, spec: MachineSpec) -> pages.Mapping:
    """Where the guest's memory is in the monitor: a sealed copy of the image or the image."""
    assert spec.memory is not None
    size = spec.memory_mb << 20
    try:
        return pages.find_mapping(pid, SealedMemories.name(spec.memory), size)
    except LookupError:
        return pages.find_mapping(pid, str(spec.memory), size)
