"""Checkpoints and rollbacks without VMs: layers, failures, a server that is killed."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
import structlog

from support.host_stand import Stand
from support.killed_server import killed_in
from support.qcow2 import qemu_io
from wrenn_sandbox.errors import HostFailure, InvalidState, NotFound
from wrenn_sandbox.host import failpoints, sandbox, snapshots
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.vmm.base import MachineSpec, Process
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.ids import ImageId, new_image_id, new_operation_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Egress, Phase

_REAL: Final = ("machine.stopped", "machine.saved")
"""Points that there are with a virtual machine alone."""
_CHECKPOINT: Final = tuple(each for each in failpoints.CHECKPOINT if each not in _REAL)


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    """A sandbox that runs, with a file."""
    values = {"data_dir": tmp_path / "data", "driver": "fake", "hot_pool_size": 0}
    stand = Stand(Settings.model_validate(values))
    await stand.start()
    await stand.create()
    _file(stand).write_text("precious")
    yield stand
    await stand.host.destroy(stand.id, new_operation_id())
    await stand.host.close()


def _file(stand: Stand) -> Path:
    return stand.sandbox.machine.spec.files.directory / "home" / "file"


async def _checkpoint(stand: Stand) -> Manifest:
    image = new_image_id()
    info = await stand.host.checkpoint(stand.id, new_operation_id(), image)
    assert info.image_id == image
    return stand.image(image)


async def _roll_back(stand: Stand, image: ImageId) -> None:
    await stand.host.rollback(stand.id, new_operation_id(), image, Egress())


def _disk(stand: Stand, image: Manifest) -> Path:
    return stand.settings.data_dir / "images" / image.image_id / form.DISK


def _disks(stand: Stand) -> int:
    """How many disk files there are of the sandbox that runs."""
    data_dir = stand.settings.data_dir
    directories = (data_dir / "run", data_dir / "paused" / stand.id)
    return sum(len(list(each.glob("*/disk*"))) for each in directories)


async def test_what_was_written_until_then_is_in_a_checkpoint(stand: Stand) -> None:
    stand.write("write -P 1 0 64k", "write -P 1 1M 64k")
    first = await _checkpoint(stand)
    stand.write("write -P 2 1M 64k")
    second = await _checkpoint(stand)
    stand.write("write -P 3 1M 64k")
    assert stand.layers() == [1, 2]
    assert _disks(stand) == 3
    qemu_io(_disk(stand, first), "read -P 1 0 64k", "read -P 1 1M 64k")
    qemu_io(_disk(stand, second), "read -P 1 0 64k", "read -P 2 1M 64k")
    await stand.pause()
    stored = await _checkpoint(stand)
    qemu_io(_disk(stand, stored), "read -P 1 0 64k", "read -P 3 1M 64k")
    await stand.resume()
    qemu_io(stand.sandbox.machine.spec.files.overlay, "read -P 1 0 64k", "read -P 3 1M 64k")
    assert _file(stand).read_text() == "precious"


async def test_a_checkpoint_is_over_whole_memory_and_keeps_that(stand: Stand) -> None:
    before = stand.images()
    first = await _checkpoint(stand)
    base = first.memory_base_id
    assert base is not None
    assert form.MEMORY in stand.image(base).files
    assert form.MEMORY not in first.files
    await _roll_back(stand, first.image_id)
    second = await _checkpoint(stand)
    assert second.memory_base_id == base, "it is over no image that is over another one"
    await stand.host.remove_image(first.image_id)
    await stand.host.remove_image(second.image_id)
    assert stand.images() == {*before, first.image_id}, "the sandbox runs on it"
    await stand.host.destroy(stand.id, new_operation_id())
    assert stand.images() == before


async def test_memory_that_is_kept_for_a_checkpoint_alone_counts(stand: Stand) -> None:
    """Its sandbox may be gone while the memory of its reboot is not."""
    await stand.pause()
    private = new_image_id()
    await stand.sandbox.reboot(private)
    store = stand.host._store
    (store.directory(private) / form.MEMORY).chmod(0o600)
    with (store.directory(private) / form.MEMORY).open("r+b") as memory:
        memory.write(os.urandom(1 << 20))
    image = new_image_id()
    info = await stand.host.checkpoint(stand.id, new_operation_id(), image)
    assert stand.image(image).memory_base_id == private
    assert info.size == store.size(image) > 1 << 20


async def test_a_repeated_checkpoint_is_the_same(stand: Stand) -> None:
    image = new_image_id()
    first = await stand.host.checkpoint(stand.id, new_operation_id(), image)
    assert await stand.host.checkpoint(stand.id, new_operation_id(), image) == first
    assert stand.layers() == [1]
    assert [each.image_id for each in await stand.host.held_images()] == [image]


async def test_layers_of_checkpoints_are_merged(stand: Stand) -> None:
    for number in range(1, 7):
        stand.write(f"write -P {number} {number}M 64k")
        await _checkpoint(stand)
        await stand.settled()
    assert len(stand.layers()) <= stand.settings.max_disk_layers
    await stand.pause()
    await stand.resume()
    reads = [f"read -P {number} {number}M 64k" for number in range(1, 7)]
    qemu_io(stand.sandbox.machine.spec.files.overlay, *reads)


async def test_what_a_vmm_has_open_is_bounded(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_MOST_ADDED_LAYERS", 2)
    for _ in range(2):
        await _checkpoint(stand)
    with pytest.raises(InvalidState, match="pause and resume it first"):
        await _checkpoint(stand)
    assert stand.sandbox.phase is Phase.RUNNING
    await stand.pause()
    await stand.resume()
    await _checkpoint(stand)


async def test_merged_layers_that_a_vmm_keeps_are_bounded(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = 3 * stand.image(stand.sandbox.machine.record.image_id).disk_size
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "held_open", lambda *_: kept)
        with pytest.raises(InvalidState, match="pause and resume it first"):
            await _checkpoint(stand)
    assert stand.layers() == []
    await _checkpoint(stand)


@pytest.mark.parametrize("added", [False, True])
async def test_a_layer_that_may_not_have_been_added(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, added: bool
) -> None:
    """The VMM is asked; nothing is lost, and nothing left where it was not."""
    real = FakeDriver.add_layer

    async def fails(self: FakeDriver, process: Process, spec: MachineSpec, layer: Path) -> None:
        if added:
            await real(self, process, spec, layer)
        raise HostFailure("no answer")

    monkeypatch.setattr(FakeDriver, "add_layer", fails)
    stand.write("write -P 1 0 64k")
    if added:
        await _checkpoint(stand)
    else:
        with pytest.raises(HostFailure):
            await _checkpoint(stand)
        assert stand.generations() == set()
        assert await stand.host.held_images() == []
    assert stand.layers() == [1] * added
    assert _disks(stand) == 1 + added
    stand.write("read -P 1 0 64k")
    await stand.pause()
    await stand.resume()
    stand.write("read -P 1 0 64k")


async def test_a_checkpoint_that_fails_leaves_the_sandbox_running(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    images = stand.images()
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "merge_disks", fails)
        with pytest.raises(Exception, match="no disk space"):
            await _checkpoint(stand)
    assert stand.images() == images
    assert await stand.host.held_images() == []
    assert stand.sandbox.phase is Phase.RUNNING
    await _checkpoint(stand)


async def test_a_guest_that_stood_still_without_a_server_is_told_the_time(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is killed during a checkpoint leaves it so, for as long as there is none."""
    told = asyncio.Event()

    async def note(self: GuestClient, token: str, timestamp: str) -> None:
        told.set()

    await stand.host.close()
    monkeypatch.setattr(GuestClient, "set_clock", note)
    await stand.start()
    async with asyncio.timeout(patience(20)):
        await told.wait()


async def test_a_sandbox_that_stopped_by_itself_has_no_checkpoint(stand: Stand) -> None:
    await stand.pause()
    stand.sandbox.own_stored(msgspec.structs.replace(stand.manifest, stopped="a reboot"))
    with pytest.raises(InvalidState, match="only its disk"):
        await _checkpoint(stand)
    assert await stand.host.held_images() == []


@pytest.mark.parametrize("paused", [False, True])
async def test_a_rollback_that_fails_leaves_the_sandbox_as_it_was(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    image = await _checkpoint(stand)
    machine = stand.sandbox.machine
    _file(stand).write_text("later")
    if paused:
        await stand.pause()

    async def fails(*_: object) -> None:
        raise HostFailure("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Machine, "initialize_guest", fails)
        with pytest.raises(HostFailure):
            await _roll_back(stand, image.image_id)
    with pytest.raises(NotFound):
        await _roll_back(stand, new_image_id())
    if paused:
        assert stand.sandbox.phase is Phase.PAUSED
        await stand.resume()
    else:
        assert stand.sandbox.machine is machine
    assert _file(stand).read_text() == "later"
    await _roll_back(stand, image.image_id)
    assert _file(stand).read_text() == "precious"


async def test_a_sandbox_that_is_destroyed_while_it_is_checkpointed(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, real = asyncio.Event(), FakeDriver.add_layer

    async def slowly(self: FakeDriver, process: Process, spec: MachineSpec, layer: Path) -> None:
        arrived.set()
        await asyncio.sleep(0.2)
        await real(self, process, spec, layer)

    monkeypatch.setattr(FakeDriver, "add_layer", slowly)
    image = new_image_id()
    making = asyncio.ensure_future(stand.host.checkpoint(stand.id, new_operation_id(), image))
    await arrived.wait()
    await stand.host.destroy(stand.id, new_operation_id())
    await asyncio.gather(making, return_exceptions=True)
    await stand.host.remove_image(image)
    data_dir = stand.settings.data_dir
    assert list((data_dir / "run").iterdir()) == list((data_dir / "paused").iterdir()) == []
    assert image not in stand.images()


async def _dies(stand: Stand, point: str, what: str, image: ImageId) -> None:
    """A server that takes over, is asked for this and does not survive it; then another one."""
    await stand.host.close()
    data_dir = stand.settings.data_dir
    await killed_in(what, point, data_dir, stand.id, image, WRENN_DRIVER="fake")
    await stand.start()


@pytest.mark.parametrize("point", _CHECKPOINT)
async def test_a_server_killed_while_it_makes_a_checkpoint(stand: Stand, point: str) -> None:
    images, image = stand.images(), new_image_id()
    stand.write("write -P 1 0 64k")
    await _dies(stand, point, "checkpoint", image)
    added = _CHECKPOINT.index(point) >= _CHECKPOINT.index("layer.added")
    assert stand.layers() == [1] * added
    assert stand.generations() == {1} & {added}
    assert _disks(stand) == 1 + added
    stand.write("read -P 1 0 64k", "write -P 2 1M 64k")
    done = point == "checkpoint.published"
    assert stand.images() == ({*images, image} if done else images)
    assert [each.image_id for each in await stand.host.held_images()] == [image] * done
    again = await _checkpoint(stand)
    qemu_io(_disk(stand, again), "read -P 1 0 64k", "read -P 2 1M 64k")
    await stand.pause()
    await stand.resume()
    stand.write("read -P 1 0 64k", "read -P 2 1M 64k")
    assert _file(stand).read_text() == "precious"


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("point", failpoints.ROLLBACK)
async def test_a_server_killed_while_it_rolls_back(stand: Stand, point: str, paused: bool) -> None:
    image = await _checkpoint(stand)
    _file(stand).write_text("later")
    if paused:
        await stand.pause()
    await _dies(stand, point, "rollback", image.image_id)
    done = point == "machine.running" or point.startswith("rollback.")
    runs = done or not paused
    assert stand.sandbox.phase is (Phase.RUNNING if runs else Phase.PAUSED)
    assert len(list((stand.settings.data_dir / "run").iterdir())) == runs
    if not runs:
        await stand.resume()
    assert _file(stand).read_text() == ("precious" if done else "later")
    await _roll_back(stand, image.image_id)
    assert _file(stand).read_text() == "precious"
    assert stand.layers() == []
