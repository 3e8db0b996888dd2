"""What idle sandboxes take: guest memory that they do not share, and their share of all memory."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from wrenn_sandbox.host.memory.page_server import PageServer
from wrenn_sandbox.host.memory.pages import Mapping
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory

from .report import Check, Report
from .rig import Rig, guest_memory

COUNTS = (1, 5, 10)
LIMIT_MB = 10
_IDLE_SEC = 5.0
_MB = 1 << 20
_SMAPS_LINE = re.compile(r"^(?:([0-9a-f]+)-[0-9a-f]+ |Private_\w+:\s+(\d+) kB)", re.MULTILINE)


async def measure(settings: Settings) -> Report:
    """Restored sandboxes that were never asked for anything, some seconds old."""
    report = Report("memory of idle sandboxes")
    totals: dict[int, float] = {}
    own: list[float] = []
    with working_directory(settings.data_dir, "bench") as data_dir:
        changes = {"data_dir": data_dir, "hot_pool_size": 0}
        async with Rig.open(settings.model_copy(update=changes)) as rig:
            sandboxes: list[SandboxId] = []
            for count in COUNTS:
                while len(sandboxes) < count:
                    sandboxes.append(await rig.create())
                await asyncio.sleep(_IDLE_SEC)
                shares = [pss_mb(rig.machine(each).process.pid) for each in sandboxes]
                totals[count] = sum(shares)
                report.add(f"PSS of each of {count}", shares, "MB")
            own = [rig.own_bytes(each) / _MB for each in sandboxes]
    report.add("guest memory of its own", own, "MB")
    first, last = COUNTS[0], COUNTS[-1]
    marginal = (totals[last] - totals[first]) / (last - first)
    report.notes = [f"each sandbox after the first adds {marginal:.1f} MB of PSS"]
    report.checks = [Check("guest memory of its own, worst, MB", max(own), at_most=LIMIT_MB)]
    return report


def pss_mb(pid: int) -> float:
    """The proportional share of all memory that a process maps, in MiB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


async def own_mb(rig: Rig, sandbox: SandboxId) -> float:
    """Memory that the VMM shares with nobody, without guest memory, in MiB.

    A page server that it has counts as its own.
    """
    machine = rig.machine(sandbox)
    pid = machine.process.pid
    server = await PageServer.adopt(machine.spec.files)
    if server is None:
        return private_mb(pid, [guest_memory(pid, machine.spec)])
    try:
        return private_mb(pid, server.mappings(pid, machine.spec.memory_mb << 20)) + private_mb(
            server.pid
        )
    finally:
        server.detach()


def private_mb(pid: int, without: Sequence[Mapping] = ()) -> float:
    """What a process maps that no other one does, besides those mappings, in MiB."""
    total, counts = 0, True
    for start, kb in _SMAPS_LINE.findall(Path(f"/proc/{pid}/smaps").read_text()):
        if start:
            counts = not any(each.low <= int(start, 16) < each.high for each in without)
        elif counts:
            total += int(kb)
    return total / 1024
