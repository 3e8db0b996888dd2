"""What this machine offers: chosen once at start by settings and probing."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

import structlog

from wrenn_sandbox.host.network.choose import NetworkChoice, choose_network, slot_source
from wrenn_sandbox.host.network.slot import SlotSource
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.executor import NetnsExecutor
from wrenn_sandbox.host.probe import kvm_verdict
from wrenn_sandbox.host.vmm.base import Driver
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.host.vmm.qemu import QemuDriver
from wrenn_sandbox.settings import Settings

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Equipment:
    """Driver, network slots (not yet started) and the way into them."""

    driver: Driver
    slots: SlotSource
    executor: NetnsExecutor
    network: str
    undo: AsyncExitStack

    @classmethod
    async def of(cls, settings: Settings, paths: Paths) -> Self:
        """Choose by settings and probing; raises `HostFailure` where nothing fits."""
        async with AsyncExitStack() as undo:
            executor = NetnsExecutor()
            undo.callback(executor.close)
            driver: Driver
            if settings.driver == "fake":
                choice = NetworkChoice("user", ("the fake driver needs no network",))
                driver = FakeDriver()
            else:
                choice = choose_network(settings)
                driver = await QemuDriver.create(await _accelerator(settings, paths), executor)
            undo.push_async_callback(driver.close)
            _log.info("network", mode=choice.mode, reasons=list(choice.reasons))
            slots = slot_source(settings, choice)
            return cls(driver, slots, executor, choice.mode, undo.pop_all())

    async def close(self) -> None:
        """Let go of machines and threads."""
        await self.undo.aclose()


async def _accelerator(settings: Settings, paths: Paths) -> str:
    if settings.accelerator != "auto":
        return settings.accelerator
    verdict = await kvm_verdict(paths.probe_verdict)
    _log.info("accelerator", kvm=verdict.usable, reason=verdict.reason)
    return "kvm" if verdict.usable else "tcg"
