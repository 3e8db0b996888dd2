"""The server is killed at each step of a checkpoint and of a rollback, and started again.

The sandbox is what it was, with all that its guest wrote, or what it was to become; nothing is
left when all is deleted.
"""

import pytest

from support.killed_server import killed_in
from support.vm.world import World
from wrenn_sandbox.errors import NotFound
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.ids import ImageId, SandboxId, new_image_id
from wrenn_sandbox.wire.messages import Phase

pytestmark = pytest.mark.vm


async def _dies(world: World, point: str, what: str, sandbox: SandboxId, image: ImageId) -> None:
    """A server that takes over, is asked for this and does not survive it; then another one."""
    await world.host.close()
    data_dir = world.settings.data_dir
    await killed_in(what, point, data_dir, sandbox, image, WRENN_SLOT_POOL_SIZE="2")
    await world.start()


def _disks(world: World, sandbox: SandboxId) -> int:
    """How many disk files there are of a sandbox that runs."""
    directories = (world.settings.data_dir / "run", world.settings.data_dir / "paused" / sandbox)
    return sum(len(list(each.glob("*/disk*"))) for each in directories)


@pytest.mark.parametrize("point", failpoints.CHECKPOINT)
async def test_a_checkpoint_killed_at_any_step_loses_nothing(world: World, point: str) -> None:
    images = world.images()
    sandbox = await world.create()
    await world.output(sandbox, "head -c 3M /dev/urandom > /root/before; sync")
    image = new_image_id()
    await _dies(world, point, "checkpoint", sandbox, image)
    added = failpoints.CHECKPOINT.index(point) >= failpoints.CHECKPOINT.index("layer.added")
    assert world.phase(sandbox) is Phase.RUNNING
    assert world.layers(sandbox) == added
    assert _disks(world, sandbox) == 1 + added
    digests = await world.output(
        sandbox, "head -c 3M /dev/urandom > /root/after; sync; cd /root; sha256sum before after"
    )
    if point == "checkpoint.published":
        clone = await world.create(image)
        found = await world.output(clone, "cd /root; sha256sum before; ls")
        assert found.splitlines() == [digests.splitlines()[0], "before"]
        await world.destroy(clone)
        await world.host.remove_image(image)
    else:
        with pytest.raises(NotFound):
            await world.create(image)
        assert await world.host.held_images() == []
    assert world.images() == images
    script = "echo 3 > /proc/sys/vm/drop_caches; cd /root; sha256sum before after"
    assert await world.output(sandbox, script) == digests
    again = await world.checkpoint(sandbox)
    await world.pause(sandbox)
    await world.resume(sandbox)
    assert await world.output(sandbox, script) == digests
    clone = await world.create(again)
    assert await world.output(clone, script) == digests


@pytest.mark.parametrize(
    ("point", "state"),
    [
        ("machine.greeted", Phase.RUNNING),
        ("machine.running", Phase.RUNNING),
        ("rollback.switched", Phase.PAUSED),
        ("rollback.ended", Phase.RUNNING),
    ],
)
async def test_a_rollback_of_a_vm_killed_half_way_is_done_or_not(
    world: World, point: str, state: Phase
) -> None:
    """All points are tried without VMs."""
    sandbox = await world.create()
    await world.output(sandbox, "echo then > /root/file; sync")
    image = await world.checkpoint(sandbox)
    await world.output(sandbox, "echo now > /root/file; sync")
    if state is Phase.PAUSED:
        await world.pause(sandbox)
    await _dies(world, point, "rollback", sandbox, image)
    done = point == "machine.running" or point.startswith("rollback.")
    assert world.phase(sandbox) is (Phase.RUNNING if done else state)
    assert len(list((world.settings.data_dir / "run").iterdir())) == (
        world.phase(sandbox) is Phase.RUNNING
    )
    if not done and state is Phase.PAUSED:
        await world.resume(sandbox)
    script = "echo 3 > /proc/sys/vm/drop_caches; cat /root/file"
    assert await world.output(sandbox, script) == ("then" if done else "now")
    await world.pause(sandbox)
    await world.resume(sandbox)
    assert await world.output(sandbox, script) == ("then" if done else "now")
    await world.roll_back(sandbox, image)
    assert await world.output(sandbox, script) == "then"
