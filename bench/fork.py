"""Clones of a running sandbox that changed 100 MB, against its pause and resume and a create."""

from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.vmm.qemu.driver import QemuDriver
from wrenn_sandbox.ids import ImageId, SandboxId, new_image_id, new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory

from .report import Check, Report
from .rig import Rig
from .spans import Spans, Step
from .timing import Stopwatch

CHANGED_MB = 100
CLONES = 10
CREATE, CYCLE = "restored create", "pause and resume, 100 MB changed"
FORK, CHECKPOINT = "fork: checkpoint and create", "of that, the checkpoint"
CLONE = "create of each of ten clones"
STILL, STORED = "standstill of a checkpoint", "stop until stored of a pause"
OWN, CHANGED = "unshared guest memory of each clone", "changed pages of the parent"
_MB = 1 << 20
_STEPS = [Step("store", QemuDriver, "pause"), Step("layer", Machine, "add_layer")]
_STEPS += [Step("run on", QemuDriver, "unpause")]


async def measure(settings: Settings, rounds: int) -> Report:
    """`rounds` sandboxes, each forked once and then ten times."""
    watch = Stopwatch()
    own: list[float] = []
    changed: list[float] = []
    with working_directory(settings.data_dir, "bench") as data_dir:
        changes = {"data_dir": data_dir, "hot_pool_size": 0}
        async with Rig.open(settings.model_copy(update=changes)) as rig:
            await rig.destroy(await rig.create())
            for _ in range(rounds):
                parent = await rig.create()
                await rig.fill(parent, CHANGED_MB)
                await _turn(rig, parent, watch)
                changed.append(rig.own_bytes(parent))
                own += await _ten(rig, parent, watch)
                await rig.destroy(parent)
    return _report(watch, own, changed)


async def _turn(rig: Rig, parent: SandboxId, watch: Stopwatch) -> None:
    """One fork, and what it is compared with."""
    await rig.settled()
    spans = Spans()
    with watch.lap(FORK):
        with watch.lap(CHECKPOINT), spans.watching(_STEPS):
            image = await _checkpoint(rig, parent)
        clone = await rig.create(image)
    watch.samples[STILL].append(sum(each[0] for each in spans.samples.values()))
    await rig.destroy(clone)
    await rig.agent.remove_image(image)
    await rig.settled()
    spans = Spans()
    with watch.lap(CYCLE):
        with spans.watching(_STEPS[:1]):
            await rig.pause(parent)
        await rig.resume(parent)
    watch.samples[STORED].append(spans.samples["store"][0])


async def _ten(rig: Rig, parent: SandboxId, watch: Stopwatch) -> list[float]:
    """Clones beside ordinary creates; bytes of memory that each clone has for itself."""
    image = await _checkpoint(rig, parent)
    await rig.destroy(await rig.create(image))
    clones: list[SandboxId] = []
    for _ in range(CLONES):
        await rig.settled()
        with watch.lap(CREATE):
            other = await rig.create()
        await rig.destroy(other)
        await rig.settled()
        with watch.lap(CLONE):
            clones.append(await rig.create(image))
    found = [float(rig.own_bytes(each)) for each in clones]
    for each in clones:
        await rig.destroy(each)
    await rig.agent.remove_image(image)
    return found


async def _checkpoint(rig: Rig, sandbox: SandboxId) -> ImageId:
    image = new_image_id()
    await rig.agent.checkpoint(sandbox, new_operation_id(), image)
    return image


def _report(watch: Stopwatch, own: list[float], changed: list[float]) -> Report:
    report = Report("fork")
    names = (CREATE, CLONE, CYCLE, FORK, CHECKPOINT, STORED, STILL)
    found = {name: report.add(name, watch.samples[name]).median for name in names}
    least = report.add(CHANGED, [each / _MB for each in changed], "MB").median
    report.add(OWN, [each / _MB for each in own], "MB")
    ten = sum(own) / len(changed) / _MB
    report.notes = [f"ten clones have {ten:.1f} MB of guest memory that they do not share"]
    report.checks = [
        Check("fork / pause and resume", found[FORK] / found[CYCLE], at_most=1.3),
        Check("create of a clone / restored create", found[CLONE] / found[CREATE], at_most=1.5),
        Check("standstill / stop until stored", found[STILL] / found[STORED], at_most=1.2),
        Check("unshared memory of a clone, worst / changed", max(own) / _MB / least, at_most=0.1),
    ]
    return report
