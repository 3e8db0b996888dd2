"""What a sandbox costs its host, as ratios: for hosts whose times say little, as those of the lab.

Everything is measured turn by turn against QEMU alone, which restores the same snapshot until the
guest agent answers. Where a binary of Firecracker is named, sandboxes on it take their turns too.
"""

import asyncio
import hashlib
import mmap
import os
import resource
import statistics
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.launch_source import source_of
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory

from .bare import Bare
from .memory import own_mb, pss_mb
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


@dataclass(frozen=True)
class _Idle:
    """What sandboxes take that do nothing, in MB for each."""

    pss: list[float]
    own: list[float]
    """Of the VMM, shared with nobody, guest memory apart."""
    guest: list[float]
    """Guest memory shared with nobody."""
    resumed: list[float]
    """`own` after a pause and a resume: a page server may be part of it."""


async def measure(settings: Settings, rounds: int, firecracker: Path | None) -> Report:
    """All ways `rounds` times, after one that does not count."""
    watch = Stopwatch()
    report = Report("under KVM")
    counts: dict[str, list[float]] = {}
    other, other_watch = None, Stopwatch()
    async with AsyncExitStack() as stack:
        rigs = []
        if firecracker is not None:
            directory = stack.enter_context(working_directory(settings.data_dir, "bench"))
            changes = {
                "data_dir": directory,
                "hot_pool_size": 0,
                "driver": "firecracker",
                "firecracker": firecracker,
            }
            copy = settings.model_copy(update=changes)
            other = await stack.enter_async_context(Rig.open(copy))
        data_dir = settings.data_dir
        for hot in (0, 1):  # the second has the snapshot that the first has made
            data_dir = stack.enter_context(working_directory(data_dir, "bench"))
            changes = {"data_dir": data_dir, "hot_pool_size": hot, "driver": "qemu"}
            copy = settings.model_copy(update=changes)
            rigs.append(await stack.enter_async_context(Rig.open(copy)))
        plain, hot_rig = rigs
        report.title = f"under {plain.context.driver.capabilities.accelerator.upper()}"
        for turn in range(1 + rounds):
            kept = watch if turn else Stopwatch()
            await _bare(plain, kept)
            await _claim(hot_rig, kept)
            await _life(plain, kept, counts if turn else {})
            if other is not None:
                await _life(other, other_watch if turn else Stopwatch(), {})
        idle = await _idle(plain)
        other_idle = None if other is None else await _idle(other)
    found = {
        name: report.add(name, watch.samples[name]).median
        for name in (BARE, CREATE, CLAIM, PAUSE, COPY, RESUME)
    }
    for name, numbers in counts.items():
        report.add(name, numbers, "")
    _add_idle(report, "", idle)
    report.checks = [
        Check("restored create / bare QEMU", found[CREATE] / found[BARE], at_most=2),
        Check("hot claim / restored create", found[CLAIM] / found[CREATE], at_most=0.25),
        Check("pause / what it does with the pages", found[PAUSE] / found[COPY], at_most=3),
        Check("resume / restored create", found[RESUME] / found[CREATE], at_most=2),
        Check("PSS of an idle sandbox, worst, MB", max(idle.pss), at_most=25),
    ]
    if other is None or other_idle is None:
        report.notes = ["without Firecracker: --firecracker names its binary"]
        return report
    beside = {
        name: report.add(f"Firecracker: {name}", other_watch.samples[name]).median
        for name in (CREATE, PAUSE, RESUME)
    }
    _add_idle(report, "Firecracker: ", other_idle)
    own = statistics.median(other_idle.own) / statistics.median(idle.own)
    report.checks += [
        Check("restored create, Firecracker / QEMU", beside[CREATE] / found[CREATE], at_most=1),
        Check("memory of the VMM alone, Firecracker / QEMU", own, at_most=0.5),
    ]
    versions = (each.context.driver.capabilities.version for each in (other, plain))
    report.notes = ["Firecracker {} beside QEMU {}".format(*versions)]
    return report


def _add_idle(report: Report, prefix: str, idle: _Idle) -> None:
    report.add(f"{prefix}PSS of each of {IDLE} idle sandboxes", idle.pss, "MB")
    report.add(f"{prefix}of that, the VMM's alone", idle.own, "MB")
    report.add(f"{prefix}of that, guest memory not shared", idle.guest, "MB")
    report.add(f"{prefix}the VMM's alone, resumed", idle.resumed, "MB")


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
    await rig.settled()


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


async def _idle(rig: Rig) -> _Idle:
    sandboxes = [await rig.create() for _ in range(IDLE)]
    await asyncio.sleep(_IDLE_SEC)
    pss = [pss_mb(rig.machine(each).process.pid) for each in sandboxes]
    own = [await own_mb(rig, each) for each in sandboxes]
    guest = [rig.own_bytes(each) / _MB for each in sandboxes]
    for each in sandboxes:
        await rig.pause(each)
        await rig.resume(each)
    await asyncio.sleep(_IDLE_SEC)
    return _Idle(pss, own, guest, [await own_mb(rig, each) for each in sandboxes])
