"""What this machine offers: chosen once at start by settings and probing."""

import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

import structlog

from wrenn_sandbox.host.network.choice import choose_network
from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.network.slot import AGENT_PORT, Slot, SlotSource
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.probe import kvm_verdict
from wrenn_sandbox.host.vmm.base import Driver
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.host.vmm.qemu import QemuDriver
from wrenn_sandbox.settings import Settings

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Equipment:
    """Driver, network slots and the way to a guest; `network` is tap or user."""

    driver: Driver
    slots: SlotSource
    network: str
    connect: Callable[[Slot], Awaitable[socket.socket]]
    undo: AsyncExitStack

    @classmethod
    async def of(cls, settings: Settings, paths: Paths) -> Self:
        """Choose by settings and probing; raises `HostFailure` where nothing fits."""
        async with AsyncExitStack() as undo:
            namespaces = NamespaceThread("wrenn-netns")
            undo.callback(namespaces.close)
            driver: Driver
            if settings.driver == "fake":
                network = "user"
                driver = FakeDriver()
            else:
                network = choose_network(settings)
                driver = await QemuDriver.create(await _accelerator(settings, paths), namespaces)
            undo.push_async_callback(driver.close)
            slots = (
                SlotPool.from_settings(settings)
                if network == "tap"
                else UserModeSlots.from_settings(settings)
            )
            return cls(driver, slots, network, _connector(namespaces), undo.pop_all())

    async def close(self) -> None:
        """Let go of machines and threads."""
        await self.undo.aclose()


async def _accelerator(settings: Settings, paths: Paths) -> str:
    if settings.accelerator != "auto":
        return settings.accelerator
    verdict = await kvm_verdict(paths.probe_verdict)
    _log.info("accelerator", kvm=verdict.usable, reason=verdict.reason)
    return "kvm" if verdict.usable else "tcg"
