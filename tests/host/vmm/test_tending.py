"""What the QEMU driver does from time to time for the VMs that run."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.paths import MachineFiles, Paths
from wrenn_sandbox.host.privileged.confinement import Confinement
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.vmm.base import Process
from wrenn_sandbox.host.vmm.qemu.command import Program, Variant
from wrenn_sandbox.host.vmm.qemu.driver import Qemu, QemuDriver
from wrenn_sandbox.host.vmm.qemu.monitor import Monitor
from wrenn_sandbox.host.vmm.qemu.process import Running


class Unconfined:
    """Nothing to sweep."""

    groups = None


class FakeMonitor:
    """A monitor that says its state once all that are asked together have been asked."""

    def __init__(self, state: str, asked: asyncio.Barrier | None = None) -> None:
        self.state = state
        self._asked = asked

    async def status(self) -> str:
        if self._asked is not None:
            await self._asked.wait()
        if self.state == "silent":
            raise HostFailure("The VMM refused the command or has exited.")
        return self.state

    async def cont(self) -> None:
        self.state = "running"


@pytest.fixture
async def driver(tmp_path: Path) -> QemuDriver:
    variant = Variant(Program(("qemu",)), "tcg", None, None)
    return QemuDriver(
        Qemu(variant, (8, 2, 0)),
        EngineStore(Paths(tmp_path)),
        cast(NamespaceThread, None),
        cast(Confinement, Unconfined()),
    )


def _run(driver: QemuDriver, directory: Path, monitor: FakeMonitor) -> Running:
    running = Running(
        cast(ProcessHandle, None), cast(Monitor, monitor), MachineFiles(directory / "machine")
    )
    driver._running[Process(len(driver._running) + 1, 1)] = running
    return running


async def test_a_vm_goes_on_that_a_full_disk_stopped_and_no_other(
    driver: QemuDriver, tmp_path: Path
) -> None:
    full, paused = FakeMonitor("io-error"), FakeMonitor("paused")
    _run(driver, tmp_path, full)
    _run(driver, tmp_path, paused)
    await driver.tend(600)
    assert (full.state, paused.state) == ("running", "paused")


async def test_a_vm_that_is_being_stored_stays_stopped(driver: QemuDriver, tmp_path: Path) -> None:
    full = FakeMonitor("io-error")
    running = _run(driver, tmp_path, full)
    async with running.lock:
        await driver.tend(600)
    assert full.state == "io-error"


async def test_a_monitor_that_does_not_answer_holds_up_no_other(
    driver: QemuDriver, tmp_path: Path
) -> None:
    asked = asyncio.Barrier(3)
    monitors = [FakeMonitor(each, asked) for each in ("silent", "io-error", "silent")]
    for monitor in monitors:
        _run(driver, tmp_path, monitor)
    async with asyncio.timeout(5):
        await driver.tend(600)
    assert [each.state for each in monitors] == ["silent", "running", "silent"]
