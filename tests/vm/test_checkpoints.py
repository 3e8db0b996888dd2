"""Images of sandboxes that go on: what they hold, what clones share, and going back to one."""

import asyncio
import time

import pytest

from support.vm.world import World
from wrenn_sandbox.errors import NotFound
from wrenn_sandbox.ids import new_image_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import Phase

pytestmark = pytest.mark.vm

_WORK = (
    "echo kept > /root/file; echo tmp > /tmp/file; sync; "
    "setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo $! > /root/pid"
)
_CHECK = "cat /root/file /tmp/file; tr '\\0' ' ' < /proc/$(cat /root/pid)/cmdline"
_FOUND = "kept\ntmp\nsleep 4321"


async def test_a_checkpoint_of_a_running_sandbox(world: World) -> None:
    """The sandbox runs on with its connections, and clones find what it was."""
    source = await world.create()
    await world.output(source, _WORK)
    following = asyncio.create_task(world.output(source, "sleep 5; echo followed"))
    await asyncio.sleep(1)
    images = world.images()
    image = await world.checkpoint(source)
    assert await following == "followed"
    assert world.layers(source) == 1
    assert await world.output(source, _CHECK) == _FOUND
    await world.output(source, "echo later > /root/file; echo later > /tmp/file; sync")
    clones = await asyncio.gather(*(world.create(image) for _ in range(2)))
    for clone in clones:
        assert await world.output(clone, _CHECK) == _FOUND
    assert await world.output(source, "cat /root/file /tmp/file") == "later\nlater"
    await world.pause(source)
    await world.resume(source)
    assert await world.output(source, "cat /root/file /tmp/file") == "later\nlater"
    await world.host.remove_image(image)
    assert world.images() == {*images, image}, "clones run on it"
    await world.destroy(*clones)
    assert world.images() == images


async def test_a_checkpoint_of_a_paused_sandbox(world: World) -> None:
    """It stays paused, and its image is of what is stored."""
    source = await world.create()
    await world.output(source, _WORK)
    await world.pause(source)
    stored = world.host._sandboxes[source].stored
    image = await world.checkpoint(source)
    assert world.host._sandboxes[source].stored is stored
    clone = await world.create(image)
    assert await world.output(clone, _CHECK) == _FOUND
    await world.resume(source)
    assert await world.output(source, _CHECK) == _FOUND
    await world.pause(clone)
    again = await world.checkpoint(clone)
    manifest = world.image(again)
    assert manifest.memory_base_id == world.image(image).memory_base_id, "no chain"
    await world.host.remove_image(image)
    await world.destroy(clone)
    third = await world.create(again)
    assert await world.output(third, _CHECK) == _FOUND


async def test_checkpoints_of_clones_build_on_no_other(world: World) -> None:
    """However deep clones of clones are, an image needs one other; its clones share its pages."""
    first = await world.create()
    await world.output(first, _WORK)
    fill = "head -c 32M /dev/urandom > /dev/shm/{0}; sha256sum /dev/shm/{0}"
    digests = [await world.output(first, fill.format("one"))]
    [image] = [await world.checkpoint(first)]
    base = world.image(image).memory_base_id
    assert base is not None
    second = await world.create(image)
    digests.append(await world.output(second, fill.format("two")))
    deeper = await world.checkpoint(second)
    assert world.image(deeper).memory_base_id == base
    await world.destroy(first, second)
    await world.host.remove_image(image)
    assert image not in world.images()
    clones = [await world.create(deeper) for _ in range(3)]
    for clone in clones:
        assert world.own_bytes(clone) < 24 << 20
        found = await world.output(clone, "sha256sum /dev/shm/one /dev/shm/two")
        assert found.splitlines() == digests
        assert await world.output(clone, _CHECK) == _FOUND
    await world.pause(clones[0])
    await world.restart()
    await world.resume(clones[0])
    assert (await world.output(clones[0], "sha256sum /dev/shm/*")).splitlines() == digests
    assert (await world.output(clones[1], "sha256sum /dev/shm/*")).splitlines() == digests
    await world.destroy(*clones)
    await world.host.remove_image(deeper)
    assert deeper not in world.images()


async def test_a_clone_is_nobody_else(world: World) -> None:
    """Host name, machine id, random numbers, token and time are its own."""
    source = await world.create()
    await world.output(source, "cat /proc/sys/kernel/random/boot_id")
    image = await world.checkpoint(source)
    sandboxes = [source, *await asyncio.gather(*(world.create(image) for _ in range(3)))]
    script = "hostname; cat /etc/machine-id; od -An -tx1 -N16 /dev/urandom"
    found = [(await world.output(each, script)).splitlines() for each in sandboxes]
    for number in range(3):
        assert len({lines[number] for lines in found}) == len(sandboxes), found
    assert [lines[0] for lines in found] == sandboxes
    machines = [world.host._sandboxes[each].machine for each in sandboxes]
    assert len({each.record.token for each in machines}) == len(sandboxes)
    assert len({each.record.slot.index for each in machines}) == len(sandboxes)
    for each in sandboxes:
        guest = float(await world.output(each, "date +%s.%N"))
        assert abs(time.time() - guest) < patience(2)


async def test_going_back_to_a_checkpoint(world: World) -> None:
    """Running or paused, under the same id; what came after is gone."""
    images = world.images()
    sandbox = await world.create()
    await world.output(sandbox, _WORK)
    machine_id = await world.output(sandbox, "cat /etc/machine-id")
    image = await world.checkpoint(sandbox)
    for paused in (False, True):
        await world.output(sandbox, "echo later > /root/file; echo > /tmp/file; pkill sleep; sync")
        if paused:
            await world.pause(sandbox)
        await world.roll_back(sandbox, image)
        assert world.phase(sandbox) is Phase.RUNNING
        assert await world.output(sandbox, _CHECK) == _FOUND
        assert await world.output(sandbox, "cat /etc/machine-id; hostname") == (
            f"{machine_id}\n{sandbox}"
        )
        assert world.layers(sandbox) == 0
        assert len(list((world.settings.data_dir / "run").iterdir())) == 1
        assert not (world.settings.data_dir / "paused" / sandbox).exists()
    await world.pause(sandbox)
    await world.restart()
    await world.resume(sandbox)
    assert await world.output(sandbox, _CHECK) == _FOUND
    with pytest.raises(NotFound):
        await world.roll_back(sandbox, new_image_id())
    assert await world.output(sandbox, _CHECK) == _FOUND
    await world.host.remove_image(image)
    assert image in world.images()
    await world.destroy(sandbox)
    assert world.images() == images
