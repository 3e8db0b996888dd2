"""Where the time of create, pause and resume goes: no limits, for those who want to make it less.

Steps nest and overlap; threads run beside each other.
"""

import os

from wrenn_sandbox.host import paused
from wrenn_sandbox.host.guest.client import GuestClient
from wrenn_sandbox.host.guest.connection import Connection
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.vmm.qemu import driver
from wrenn_sandbox.host.vmm.qemu.monitor import Monitor
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory

from .pause import CHANGED_MB
from .report import Report
from .rig import Rig
from .spans import Spans, Step

START = [
    Step("slot, directory, disk", Machine, "_prepared"),
    Step("spawn to QMP", driver.QemuDriver, "_spawn"),
    Step("stored pages into memory", diff, "inject"),
    Step("load device state", Monitor, "load"),
    Step("first answer: connect", Connection, "open"),
    Step("first answer: connect and init", GuestClient, "init"),
    Step("check what is stored", paused, "check_memory"),
    Step("forget what was stored", paused, "consume"),
]
PAUSE = [
    Step("stop", Monitor, "stop"),
    Step("save device state", Monitor, "save"),
    Step("find, read, write pages", diff, "capture"),
    Step("find pages", diff, "own_pages"),
    Step("read a batch of pages", diff, "read"),
    Step("write a batch of pages", diff, "_write_all"),
    Step("digest of the disk", paused, "take_disk"),
    Step("sync and rename", paused, "commit"),
    Step("one fsync", os, "fsync"),
    Step("end the monitor", driver.QemuDriver, "kill"),
]


async def measure(settings: Settings, rounds: int) -> Report:
    """Create, pause with 32 MB changed, and resume, `rounds` times."""
    report = Report("where the time goes")
    spans = {name: Spans() for name in ("create", "pause", "resume")}
    with working_directory(settings.data_dir, "bench") as data_dir:
        changes = {"data_dir": data_dir, "hot_pool_size": 0}
        async with Rig.open(settings.model_copy(update=changes)) as rig:
            await rig.destroy(await rig.create())
            for _ in range(rounds):
                await rig.settled()
                with spans["create"].watching(START), spans["create"].lap("all"):
                    sandbox = await rig.create()
                await rig.fill(sandbox, CHANGED_MB)
                with spans["pause"].watching(PAUSE), spans["pause"].lap("all"):
                    await rig.pause(sandbox)
                await rig.settled()
                with spans["resume"].watching(START), spans["resume"].lap("all"):
                    await rig.resume(sandbox)
                await rig.destroy(sandbox)
    for operation, found in spans.items():
        for name, samples in found.samples.items():
            report.add(f"{operation}: {name}", samples)
    return report
