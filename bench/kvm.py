"""What a sandbox costs its host, as ratios: for hosts whose times say little, as those of the lab.

Everything is measured turn by turn against QEMU alone, which restores the same snapshot until the
guest agent answers.
"""

import asyncio
import hashlib
import mmap
import os
import resource
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.launch_source import source_of
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory

from .bare import Bare
from .memory import pss_mb
from .report import Check, Report
from .rig import Rig
from .timing import Stopwatch

BARE, CREATE = "bare QEMU: spawn to the agent's answer", "restored create"
CLAIM = "claim from the hot pool"
PAUSE, RESUME = "pause", "resume"
COPY = "reading, hashing, writing and syncing as much"
PER_EXIT: Final = ("exits", "pf_fixed", "halt_exits", "io_exits", "mmio_exits")
COUNTERS: Final = Path("/sys/kernel/debug/kvm")
"""Of the kernel, one directory for each VM, named by process and descriptor."""
CHANGED_MB: Final = 16
IDLE: Final = 5
_IDLE_SEC: Final = 5.0
_MB: Final = 1 << 20


async def measure(settings: Settings, rounds: int) -> Report:
    """All ways `rounds` times, after one that does not count."""
    watch = Stopwatch()
    report = Report("under KVM")
    counts: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        rigs = []
        data_dir = settings.data_dir
        for hot in (0, 1):  # the second has the snapshot that the first has made
            data_dir = stack.enter_context(working_directory(data_dir, "bench"))
            changes = {"data_dir": data_dir, "hot_pool_size": hot}
            copy = settings.model_copy(update=changes)
            rigs.append(await stack.enter_async_context(Rig.open(copy)))
        plain, hot_rig = rigs
        report.title = f"under {plain.context.driver.capabilities.accelerator.upper()}"
        for turn in range(1 + rounds):
            kept = watch if turn else Stopwatch()
            await _bare(plain, kept)
            await _claim(hot_rig, kept)
            await _life(plain, kept, counts if turn else {})
        shares = await _idle(plain)
    found = {
        name: report.add(name, watch.samples[name]).median
        for name in (BARE, CREATE, CLAIM, PAUSE, COPY, RESUME)
    }
    for name, numbers in counts.items():
        report.add(name, numbers, "")
    report.add(f"PSS of each of {IDLE} idle sandboxes", shares, "MB")
    report.checks = [
        Check("restored create / bare QEMU", found[CREATE] / found[BARE], at_most=2),
        Check("hot claim / restored create", found[CLAIM] / found[CREATE], at_most=0.25),
        Check("pause / what it does with the pages", found[PAUSE] / found[COPY], at_most=3),
        Check("resume / restored create", found[RESUME] / found[CREATE], at_most=2),
        Check("PSS of an idle sandbox, worst, MB", max(shares), at_most=25),
    ]
    return report


async def _bare(rig: Rig, watch: Stopwatch) -> None:
    await rig.settled()
    async with Bare.prepared(rig.context, source_of(rig.context, rig.warm)) as bare:
        with watch.lap(BARE):
            bare.start()
            bare.load()
            await bare.answered()


async def _claim(rig: Rig, watch: Stopwatch) -> None:
    await rig.settled()
    with watch.lap(CLAIM):
        sandbox = await rig.create()
    await rig.destroy(sandbox)
    await rig.settled()


async def _life(rig: Rig, watch: Stopwatch, counts: dict[str, list[float]]) -> None:
    """Create, pause with some memory changed, and resume."""
    await rig.settled()
    before, processor = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    with watch.lap(CREATE):
        sandbox = await rig.create()
    after = resource.getrusage(resource.RUSAGE_SELF)
    _count(rig, sandbox, counts)
    counts.setdefault("server: processor time of a create, ms", []).append(
        (time.process_time() - processor) * 1000
    )
    counts.setdefault("server: context switches of a create", []).append(
        after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
    )
    await rig.fill(sandbox, CHANGED_MB)
    own = rig.own_bytes(sandbox)
    await rig.settled()
    with watch.lap(PAUSE):
        await rig.pause(sandbox)
    with watch.lap(COPY):
        await asyncio.to_thread(_copy, rig.context.paths.data_dir / "copy", own)
    await rig.settled()
    with watch.lap(RESUME):
        await rig.resume(sandbox)
    await rig.destroy(sandbox)


def _count(rig: Rig, sandbox: SandboxId, counts: dict[str, list[float]]) -> None:
    """What the kernel has counted of a VM since its start; without KVM its page faults alone."""
    pid = rig.machine(sandbox).process.pid
    for directory in COUNTERS.glob(f"{pid}-*"):
        for name in PER_EXIT:
            if (directory / name).exists():
                value = float((directory / name).read_text())
                counts.setdefault(f"KVM: {name} of a create", []).append(value)
    stat = Path(f"/proc/{pid}/stat").read_text()
    minor, major = (int(stat.rsplit(")")[-1].split()[each]) for each in (7, 9))
    counts.setdefault("page faults of the VMM in a create", []).append(minor + major)


def _copy(target: Path, size: int) -> None:
    """Write so many random bytes to a file and hash them, as a pause does with pages."""
    buffer = mmap.mmap(-1, 4 * _MB)
    buffer[:] = os.urandom(len(buffer))
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while size > 0:
            part = bytes(buffer[: min(size, len(buffer))])
            digest.update(part)
            file.write(part)
            size -= len(part)
        file.flush()
        os.fsync(file.fileno())
    target.unlink()


async def _idle(rig: Rig) -> list[float]:
    """PSS of sandboxes that do nothing, in MB: each is one process."""
    sandboxes = [await rig.create() for _ in range(IDLE)]
    await asyncio.sleep(_IDLE_SEC)
    return [pss_mb(rig.machine(each).process.pid) for each in sandboxes]
