"""Pause and resume of a sandbox that changed 32 MB, against QEMU's own way and a create."""

from wrenn_sandbox.host import paused
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.launch_source import LaunchSource
from wrenn_sandbox.host.vmm.base import Snapshot
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory

from .bare import Bare
from .report import Check, Report
from .rig import Rig
from .timing import Stopwatch

CHANGED_MB = 32
CREATE, PAUSE, RESUME = "restored create", "pause, 32 MB changed", "resume, 32 MB changed"
FULL = "QEMU's full migration to a file, synced"
WRITTEN, OWN = "written by a pause", "changed pages"
CYCLE = "cycle {}: pause and resume"
EARLY, LATE = 2, 10
_MB = 1 << 20


async def measure(settings: Settings, rounds: int, cycle_rounds: int) -> Report:
    """`rounds` sandboxes paused and resumed once, `cycle_rounds` pairs of them up to ten times."""
    watch = Stopwatch()
    own: list[float] = []
    written: list[float] = []
    with working_directory(settings.data_dir, "bench") as data_dir:
        changes = {"data_dir": data_dir, "hot_pool_size": 0}
        async with Rig.open(settings.model_copy(update=changes)) as rig:
            await rig.destroy(await rig.create())
            for _ in range(rounds):
                await rig.settled()
                with watch.lap(CREATE):
                    sandbox = await rig.create()
                await rig.fill(sandbox, CHANGED_MB)
                own.append(rig.own_bytes(sandbox))
                with watch.lap(PAUSE):
                    await rig.pause(sandbox)
                written.append(_written(rig, sandbox))
                await rig.settled()
                await _full_migration(rig, sandbox, watch)
                await rig.settled()
                with watch.lap(RESUME):
                    await rig.resume(sandbox)
                await rig.destroy(sandbox)
            for turn in range(cycle_rounds):
                await _cycles(rig, watch, old_first=bool(turn % 2))
    return _report(watch, own, written)


async def _full_migration(rig: Rig, sandbox: SandboxId, watch: Stopwatch) -> None:
    """The same machine, continued by QEMU alone from what the pause stored."""
    paths = rig.context.paths
    manifest = paused.newest(paths, sandbox)
    assert manifest is not None
    directory = paths.generation(sandbox, manifest.generation)
    source = LaunchSource(
        image=rig.warm,
        vcpus=rig.warm.vcpus,
        memory_mb=rig.warm.memory_mb,
        disk=Disk(directory / form.DISK, raw=False),
        snapshot=Snapshot(directory / form.VMSTATE, directory),
    )
    async with Bare.prepared(rig.context, source) as bare:
        bare.start()
        bare.load()
        bare.unlimited()
        target = paths.data_dir / "migrated"
        with watch.lap(FULL):
            bare.migrate(target)
        assert target.stat().st_size > CHANGED_MB * _MB
        target.unlink()


def _written(rig: Rig, sandbox: SandboxId) -> int:
    """Bytes of the files of the newest generation but its disk, which the guest wrote."""
    paths = rig.context.paths
    manifest = paused.newest(paths, sandbox)
    assert manifest is not None
    directory = paths.generation(sandbox, manifest.generation)
    return sum(path.stat().st_size for path in directory.iterdir() if path.name != form.DISK)


async def _cycles(rig: Rig, watch: Stopwatch, *, old_first: bool) -> None:
    """The second cycle of a new sandbox beside the tenth of another."""
    old, new = await rig.create(), await rig.create()
    for sandbox, count in ((old, LATE - 1), (new, EARLY - 1)):
        await rig.fill(sandbox, CHANGED_MB)
        for _ in range(count):
            await _cycle(rig, sandbox)
    sides = [(new, CYCLE.format(EARLY)), (old, CYCLE.format(LATE))]
    for sandbox, name in reversed(sides) if old_first else sides:
        await rig.settled()
        with watch.lap(name):
            await _cycle(rig, sandbox)
    for sandbox in (old, new):
        await rig.destroy(sandbox)


async def _cycle(rig: Rig, sandbox: SandboxId) -> None:
    await rig.pause(sandbox)
    await rig.resume(sandbox)


def _report(watch: Stopwatch, own: list[float], written: list[float]) -> Report:
    report = Report("pause and resume")
    found = {
        name: report.add(name, watch.samples[name]).median
        for name in (CREATE, PAUSE, FULL, RESUME, *(CYCLE.format(n) for n in (EARLY, LATE)))
    }
    report.add(OWN, [each / _MB for each in own], "MB")
    report.add(WRITTEN, [each / _MB for each in written], "MB")
    excess = max(w - (1.1 * o + _MB) for w, o in zip(written, own, strict=True))
    report.checks = [
        Check("bytes written over 1.1 x changed + 1 MB, worst, MB", excess / _MB, at_most=0),
        Check("pause / full migration", found[PAUSE] / found[FULL], at_most=1 / 3),
        Check("resume / restored create", found[RESUME] / found[CREATE], at_most=2),
        Check(
            "tenth cycle / second cycle",
            found[CYCLE.format(LATE)] / found[CYCLE.format(EARLY)],
            at_most=1.3,
        ),
    ]
    return report
