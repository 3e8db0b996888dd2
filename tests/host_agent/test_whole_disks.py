"""A host whose driver has disks without layers: the Firecracker driver over the played API."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from support.host_stand import Stand
from support.vm.played import PLAYED
from wrenn_sandbox.errors import Conflict, NoCapacity
from wrenn_sandbox.host import admission
from wrenn_sandbox.host.backends import BACKENDS
from wrenn_sandbox.host.memory import sparse
from wrenn_sandbox.ids import new_image_id, new_operation_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import HostSettings, Settings
from wrenn_sandbox.testing.data_dir import working_directory


@pytest.fixture
async def stand(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    """In a place that the users of machines can reach."""
    monkeypatch.setitem(BACKENDS, "firecracker", PLAYED)
    async with contextlib.AsyncExitStack() as stack:
        data_dir = stack.enter_context(working_directory(Settings().data_dir, "whole-disks"))
        stand = Stand(Settings(data_dir=data_dir, driver="firecracker", hot_pool_size=0))
        await stand.start()
        stack.push_async_callback(lambda: stand.host.close())
        await stand.create()
        stack.push_async_callback(lambda: stand.host.destroy(stand.id, new_operation_id()))
        yield stand


def _write(stand: Stand, text: bytes) -> None:
    """What the guest would do to its disk."""
    with stand.sandbox.machine.spec.files.overlay.open("r+b") as disk:
        disk.write(text)


def _disk(stand: Stand) -> bytes:
    return stand.sandbox.machine.spec.files.overlay.read_bytes()[:6]


async def test_a_sandbox_has_one_disk_however_often_it_was_stored(stand: Stand) -> None:
    _write(stand, b"first ")
    for number in (1, 2, 3):
        await stand.pause()
        assert stand.manifest.layers == ()
        assert stand.generations() == {number}
        await stand.resume()
        assert stand.generations() == set(), "the machine has a copy"
        assert _disk(stand) == b"first "
    _write(stand, b"second")
    await stand.pause()
    await stand.resume()
    assert _disk(stand) == b"second"


async def test_a_snapshot_has_the_disk_of_its_sandbox(stand: Stand) -> None:
    _write(stand, b"stored")
    image_id = new_image_id()
    await stand.sandbox.snapshot(image_id)
    image = stand.image(image_id)
    store = stand.host._store
    assert store.disk(image).read_bytes()[:6] == b"stored"
    assert store.disk(image).stat().st_size == image.disk_size


async def test_a_sandbox_that_is_deleted_ends_the_copy_of_its_disk(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def endless(_source: int, _target: int, _size: int, check: Callable[[], None]) -> None:
        begun.set()
        try:
            for _ in range(round(patience(30) * 100)):
                check()
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(sparse, "shared", lambda *_: False)
    monkeypatch.setattr(sparse, "copy_data", endless)
    making = asyncio.ensure_future(
        stand.host.checkpoint(stand.id, new_operation_id(), new_image_id())
    )
    assert await asyncio.to_thread(begun.wait, patience(20))
    await stand.host.destroy(stand.id, new_operation_id())
    assert ended.is_set()
    with pytest.raises(Conflict):
        await making
    assert not [name for name in stand.images() if name.startswith(".staging-")]


async def test_a_reboot_leaves_one_disk_behind(stand: Stand) -> None:
    _write(stand, b"before")
    await stand.pause()
    await stand.sandbox.reboot(new_image_id())
    assert stand.generations() == {2}
    await stand.resume()
    assert _disk(stand) == b"before"


async def test_a_resume_without_room_for_the_disk_leaves_it_stored(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(stand, b"stored")
    await stand.pause()
    monkeypatch.setattr(sparse, "shared", lambda *_: False)
    asked: list[int] = []

    def full(_: HostSettings, size: int) -> None:
        asked.append(size)
        raise NoCapacity("The host has no disk space left for that")

    with monkeypatch.context() as patched:
        patched.setattr(admission, "require_room", full)
        with pytest.raises(NoCapacity, match="disk space"):
            await stand.resume()
    [size] = asked
    assert 0 < size < stand.manifest.disk_mb << 20, "what holds data is what is copied"
    await stand.resume()
    assert _disk(stand) == b"stored"
