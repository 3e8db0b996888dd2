"""What this machine offers: chosen once at start by settings and probing."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Self

import structlog

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.network.choice import choose_network
from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import runs
from wrenn_sandbox.host.vmm.base import Driver
from wrenn_sandbox.host.vmm.fake import FakeDriver, publish_template
from wrenn_sandbox.host.vmm.firecracker.binary import found, host_obstacle, require_usable
from wrenn_sandbox.host.vmm.firecracker.driver import FirecrackerDriver
from wrenn_sandbox.host.vmm.qemu.command import BINARY
from wrenn_sandbox.host.vmm.qemu.driver import QemuDriver
from wrenn_sandbox.host.vmm.qemu.kvm import kvm_cpu, named_cpu, tried
from wrenn_sandbox.settings import HostSettings
from wrenn_sandbox.wire.messages import Phase

from . import journal
from .paths import Paths
from .probe import kvm_verdict
from .slot import SlotSource

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """What a driver is made from; what it has to let go of in the end goes on `undo`."""

    settings: HostSettings
    paths: Paths
    engines: EngineStore
    namespaces: NamespaceThread
    undo: AsyncExitStack


@dataclass(frozen=True)
class Backend:
    """A driver that a host can have."""

    create: Callable[[Start], Awaitable[Driver]]
    """Raises `HostFailure` where the driver does not run here."""
    command: str
    """A pattern for the beginning of its processes' command lines."""
    user_network: bool = False
    """Its machines have no network but that of the host."""


async def _fake(start: Start) -> Driver:
    driver = FakeDriver()
    start.undo.push_async_callback(driver.close)
    await asyncio.to_thread(publish_template, ImageStore(start.paths))
    return driver


async def _qemu(start: Start) -> Driver:
    accelerator, cpu = start.settings.accelerator, "max"
    if accelerator == "auto":
        probed = await kvm_verdict(start.paths.probe_verdict)
        verdict = await asyncio.to_thread(tried, probed, BINARY)
        _log.info("accelerator", kvm=verdict.usable, reason=verdict.reason)
        accelerator, cpu = ("kvm", verdict.cpu) if verdict.usable else ("tcg", cpu)
    elif accelerator == "kvm":
        cpu = await asyncio.to_thread(kvm_cpu, BINARY)
    if (model := start.settings.cpu_model) != "auto":
        cpu = await asyncio.to_thread(named_cpu, model, BINARY, accelerator)
    driver = await QemuDriver.create(accelerator, cpu, start.namespaces, start.paths, start.engines)
    start.undo.push_async_callback(driver.close)
    return driver


async def _firecracker(start: Start) -> Driver:
    obstacle = await _obstacle(start.settings, start.paths)
    if obstacle:
        raise HostFailure(f"Firecracker does not run here: {obstacle}")
    named = start.settings.firecracker
    driver = await FirecrackerDriver.create(named, start.namespaces, start.paths, start.engines)
    start.undo.push_async_callback(driver.close)
    return driver


async def _obstacle(settings: HostSettings, paths: Paths) -> str:
    """Why no VM of Firecracker runs here, whatever its binary; empty if one does."""
    slots = choose_network(settings) == "tap"
    if obstacle := host_obstacle(settings, slots=slots):
        return obstacle
    return host_obstacle(settings, slots=slots, kvm=await kvm_verdict(paths.probe_verdict))


BACKENDS: Final[dict[str, Backend]] = {
    "qemu": Backend(_qemu, r"\S*qemu-system|\S*/engines/[0-9a-f]{64}/loader"),
    "firecracker": Backend(_firecracker, r"\S*/engines/[0-9a-f]{64}/firecracker"),
    "fake": Backend(_fake, r"\S+ -I -S \S*/agent/main\.py --port", user_network=True),
}
"""By the names that the setting `driver` takes besides `auto`."""


async def _chosen(settings: HostSettings, paths: Paths) -> str:
    """The name of this host's driver.

    Raises `HostFailure` where sandboxes run under another one: its VMs would end.
    """
    used = await asyncio.to_thread(_in_use, paths)
    chosen: str = settings.driver
    if chosen == "auto":
        chosen = "qemu" if "qemu" in used else await _best(settings, paths)
    if others := sorted(used - {chosen}):
        raise HostFailure(
            f"Sandboxes run under the driver {others[0]}, and a server with {chosen} would end"
            f" them. Start with WRENN_DRIVER={others[0]}, and pause or delete them before you"
            " change the driver"
        )
    return chosen


async def _best(settings: HostSettings, paths: Paths) -> str:
    """Firecracker where it is and runs, else QEMU."""
    binary = found(settings.firecracker)
    if binary is None or await _obstacle(settings, paths):
        return "qemu"
    try:
        await asyncio.to_thread(require_usable, binary)
    except HostFailure as error:
        _log.warning("QEMU in Firecracker's place", reason=str(error), detail=error.detail)
        return "qemu"
    return "firecracker"


def _in_use(paths: Paths) -> set[str]:
    """The drivers whose VMs run as sandboxes now; blocks."""
    boot_id = journal.boot_id()
    return {
        record.driver
        for record in journal.records(paths.run)
        if record.boot_id == boot_id
        and record.sandbox_id is not None
        and record.phase is Phase.RUNNING
        and record.process is not None
        and runs(record.process.pid, record.process.start_time)
    }


@dataclass(frozen=True)
class Backends:
    """Driver, network slots (not yet started) and the way into them."""

    driver: Driver
    engines: EngineStore
    slots: SlotSource
    namespaces: NamespaceThread
    network: str
    undo: AsyncExitStack

    @classmethod
    async def of(cls, settings: HostSettings, paths: Paths) -> Self:
        """Choose by settings and probing; raises `HostFailure` where nothing fits."""
        backend = BACKENDS[await _chosen(settings, paths)]
        async with AsyncExitStack() as undo:
            namespaces = NamespaceThread("wrenn-netns")
            undo.callback(namespaces.close)
            network = "user" if backend.user_network else choose_network(settings)
            engines = EngineStore(paths)
            await asyncio.to_thread(engines.sweep)
            driver = await backend.create(Start(settings, paths, engines, namespaces, undo))
            slots: SlotSource = (
                SlotPool(settings) if network == "tap" else UserModeSlots(settings.vmm_uid_base)
            )
            return cls(driver, engines, slots, namespaces, network, undo.pop_all())

    async def close(self) -> None:
        """Let go of machines and threads."""
        await self.undo.aclose()
