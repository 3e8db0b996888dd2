"""What this machine offers: chosen once at start by settings and probing."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

import structlog

from wrenn_sandbox.host.network.choice import choose_network
from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.vmm.base import Driver
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.host.vmm.qemu import QemuDriver
from wrenn_sandbox.settings import HostSettings

from .paths import Paths
from .probe import kvm_verdict
from .slot import SlotSource

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Backends:
    """Driver, network slots (not yet started) and the way into them."""

    driver: Driver
    slots: SlotSource
    namespaces: NamespaceThread
    network: str
    undo: AsyncExitStack

    @classmethod
    async def of(cls, settings: HostSettings, paths: Paths) -> Self:
        """Choose by settings and probing; raises `HostFailure` where nothing fits."""
        async with AsyncExitStack() as undo:
            namespaces = NamespaceThread("wrenn-netns")
            undo.callback(namespaces.close)
            network = "user" if settings.driver == "fake" else choose_network(settings)
            driver: Driver
            if settings.driver == "fake":
                driver = FakeDriver()
            else:
                accelerator = await _accelerator(settings, paths)
                driver = await QemuDriver.create(accelerator, namespaces, paths.data_dir)
            undo.push_async_callback(driver.close)
            slots: SlotSource
            if network == "tap":
                slots = SlotPool(settings)
            else:
                slots = UserModeSlots.from_settings(settings)
            return cls(driver, slots, namespaces, network, undo.pop_all())

    async def close(self) -> None:
        """Let go of machines and threads."""
        await self.undo.aclose()


async def _accelerator(settings: HostSettings, paths: Paths) -> str:
    if settings.accelerator != "auto":
        return settings.accelerator
    verdict = await kvm_verdict(paths.probe_verdict)
    _log.info("accelerator", kvm=verdict.usable, reason=verdict.reason)
    return "kvm" if verdict.usable else "tcg"
