"""Housekeeping beside everything that may happen to a sandbox meanwhile."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import structlog

from support.host_stand import Stand
from support.qcow2 import is_clean, qemu_io
from wrenn_sandbox.errors import NoCapacity
from wrenn_sandbox.host import housekeeping, merging, paused
from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.disk.qcow2 import layers
from wrenn_sandbox.host.disk_use import allocated
from wrenn_sandbox.host.housekeeping import Housekeeper
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.ids import ImageId, new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Phase


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A parameter is the number of layers from which on they are too many."""
    layers = getattr(request, "param", 2)
    values = {"data_dir": tmp_path / "data", "driver": "fake", "max_disk_layers": layers}
    return Settings.model_validate({**values, "hot_pool_size": 0})


@pytest.fixture
async def stand(settings: Settings) -> AsyncIterator[Stand]:
    stand = Stand(settings)
    await stand.start()
    await stand.create()
    try:
        yield stand
    finally:
        await stand.host.destroy(stand.id, new_operation_id())
        await stand.host.close()


@pytest.fixture
def outgrown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stored sandbox has enough pages to merge, once."""
    monkeypatch.setattr(Housekeeper, "_is_outgrown", lambda _, each: each.generation == 1)


class SlowMerge:
    """Holds merges back until told to go on; then they look whether they are still wanted."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.begun = asyncio.Event()
        self.go_on = threading.Event()
        self._loop = loop
        self._make = merging.make

    def __call__(
        self,
        context: HostContext,
        manifest: PausedSandbox,
        image_id: ImageId,
        check: Callable[[], None],
    ) -> Manifest:
        self._loop.call_soon_threadsafe(self.begun.set)

        def wait() -> None:
            assert self.go_on.wait(20)
            check()

        made = self._make(context, manifest, image_id, check)
        wait()
        return made


@pytest.fixture
async def slow_merge(
    stand: Stand, outgrown: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SlowMerge]:
    slow = SlowMerge(asyncio.get_running_loop())
    monkeypatch.setattr(merging, "make", slow)
    yield slow
    slow.go_on.set()


async def test_pages_are_merged_behind_a_pause(stand: Stand, outgrown: None) -> None:
    await stand.pause()
    await stand.settled()
    assert stand.manifest.generation == 2
    assert stand.generations() == {2}
    image = stand.image(stand.manifest.image_id)
    assert image.private
    before = stand.images()
    await stand.resume()
    assert stand.sandbox.machine.record.image_id == image.image_id
    await stand.pause()
    await stand.settled()
    assert stand.generations() == {2, 3}
    assert stand.images() == before
    await stand.host.destroy(stand.id, new_operation_id())
    assert stand.images() == before - {image.image_id}


async def test_a_resume_does_not_wait_for_a_merge(stand: Stand, slow_merge: SlowMerge) -> None:
    before = stand.images()
    await stand.pause()
    await slow_merge.begun.wait()
    await stand.resume()
    assert stand.sandbox.phase is Phase.RUNNING
    slow_merge.go_on.set()
    await stand.settled()
    assert stand.images() == before
    assert stand.generations() == {1}
    await stand.pause()
    assert stand.manifest.generation == 2


async def test_a_sandbox_that_is_deleted_during_a_merge(
    stand: Stand, slow_merge: SlowMerge
) -> None:
    before = stand.images()
    await stand.pause()
    await slow_merge.begun.wait()
    await stand.host.destroy(stand.id, new_operation_id())
    slow_merge.go_on.set()
    await stand.settled()
    assert stand.generations() == set()
    assert stand.images() == before


async def test_a_server_that_stops_during_a_merge_leaves_it_to_the_next(
    stand: Stand, slow_merge: SlowMerge
) -> None:
    before = stand.images()
    await stand.pause()
    await slow_merge.begun.wait()
    closing = asyncio.create_task(stand.host.close())
    await asyncio.sleep(0)
    slow_merge.go_on.set()
    async with asyncio.timeout(20):
        await closing
    assert stand.images() == before
    assert stand.generations() == {1}
    await stand.start()
    await stand.settled()
    assert stand.generations() == {2}
    assert len(stand.images() - before) == 1
    await stand.resume()


async def test_what_a_killed_server_had_merged_in_vain_is_collected(
    stand: Stand, outgrown: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(*_: object, **__: object) -> bool:
        raise asyncio.CancelledError

    async def not_any_more() -> None:
        return

    before = stand.images()
    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "refer_to", killed)
        patch.setattr(stand.host._collection, "run", not_any_more)
        await stand.pause()
        worker = stand.host._housekeeper._worker
        assert worker is not None
        await asyncio.wait([worker], timeout=20)
        await stand.host.close()
    assert len(stand.images() - before) == 1
    monkeypatch.setattr(Housekeeper, "_is_outgrown", lambda *_: False)
    await stand.start()
    assert stand.images() == before
    await stand.resume()


async def test_a_merge_that_fails_is_only_logged(
    stand: Stand, outgrown: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Manifest:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "make", full)
    await stand.pause()
    await stand.settled()
    assert stand.generations() == {1}
    await stand.resume()


def _rewrite(stand: Stand, number: int) -> None:
    """Every byte of the guest's disk anew."""
    stand.write(f"write -P {number + 1} 0 64M")


def _taken_mb(stand: Stand) -> int:
    machine = stand.sandbox.holding.machine_id
    found = [stand.settings.data_dir / "paused" / stand.id]
    found += [] if machine is None else [stand.settings.data_dir / "run" / machine]
    return sum(map(allocated, found)) >> 20


@pytest.mark.parametrize("settings", [100], indirect=True)
async def test_a_disk_that_is_written_anew_takes_a_bounded_multiple(stand: Stand) -> None:
    most = 0
    for number in range(6):
        _rewrite(stand, number)
        most = max(most, _taken_mb(stand))
        await stand.pause()
        await stand.settled()
        await stand.resume()
        await stand.settled()
    assert 128 <= most <= 3 * 64 * 33 / 32 + 2, most
    assert is_clean(stand.sandbox.machine.spec.files.overlay)


@pytest.mark.parametrize("settings", [100], indirect=True)
async def test_a_resume_that_would_take_more_waits_for_housekeeping(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(_: object, sandbox: Sandbox) -> None:
        assert sandbox.sandbox_id == stand.id

    with monkeypatch.context() as patch:
        patch.setattr(Housekeeper, "_collapse", late)
        for number in range(3):
            _rewrite(stand, number)
            await stand.pause()
            await stand.settled()
            if number < 2:
                await stand.resume()
                await stand.settled()
        with pytest.raises(NoCapacity, match="being merged") as caught:
            await stand.resume()
        assert caught.value.retry_after == 5
        assert stand.sandbox.phase is Phase.PAUSED
        await stand.settled()
    with pytest.raises(NoCapacity):
        await stand.resume()
    await stand.settled()
    await stand.resume()
    assert _taken_mb(stand) <= 2 * 64 * 33 / 32 + 2


async def _cycles(stand: Stand, first: int, last: int) -> None:
    for number in range(first, last):
        stand.write(f"write -P {number} {number}M 64k", f"write -P {number} 0 64k")
        await stand.pause()
        await stand.settled()
        assert len(stand.generations()) <= 4
        await stand.resume()
        await stand.settled()
        assert len(stand.layers()) <= 2
        assert stand.generations() == set(stand.layers())


def _check_disk(stand: Stand, count: int) -> None:
    overlay = stand.sandbox.machine.spec.files.overlay
    assert is_clean(overlay)
    qemu_io(overlay, *(f"read -P {number} {number}M 64k" for number in range(1, count)))
    qemu_io(overlay, f"read -P {count - 1} 0 64k", f"read -P 0 {count}M 64k")


async def test_disk_layers_of_fake_sandboxes_stay_few(stand: Stand) -> None:
    await _cycles(stand, 1, 10)
    _check_disk(stand, 10)


async def test_cycles_while_layers_are_put_together(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is not lost: what it was done for is still the lowest part of the chain."""
    begun, go_on, put_together = threading.Event(), threading.Event(), layers.put_together

    def slowly(
        chain: Sequence[Path],
        target: Path,
        *,
        below: Disk,
        size: int,
        check: Callable[[], None],
    ) -> None:
        begun.set()
        put_together(chain, target, below=below, size=size, check=check)
        assert go_on.wait(20)

    monkeypatch.setattr(layers, "put_together", slowly)
    for number in range(1, 7):
        stand.write(f"write -P {number} {number}M 64k", f"write -P {number} 0 64k")
        await stand.pause()
        await stand.resume()
    assert begun.is_set()
    assert stand.layers() == [1, 2, 3, 4, 5, 6]
    go_on.set()
    await stand.settled()
    assert stand.layers() == [6]
    assert stand.generations() == {6}
    _check_disk(stand, 7)


async def test_layers_of_a_stored_sandbox(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Housekeeper, "consider", lambda *_: None)
        for number in range(1, 5):
            stand.write(f"write -P {number} {number}M 64k", f"write -P {number} 0 64k")
            await stand.pause()
            if number < 4:
                await stand.resume()
    assert stand.layers() == [1, 2, 3]
    with monkeypatch.context() as patch:

        def full(*_: object) -> PausedSandbox:
            raise OSError(28, "No space left on device")

        patch.setattr(paused, "note_layers", full)
        stand.host._housekeeper.consider(stand.sandbox)
        await stand.settled()
    assert stand.layers() == [1, 2, 3]
    paused.check(stand.host._paths, stand.manifest)
    stand.host._housekeeper.consider(stand.sandbox)
    await stand.settled()
    assert stand.layers() == [3]
    assert stand.generations() == {3, 4}
    await stand.host.close()
    await stand.start()
    assert stand.layers() == [3]
    await stand.resume()
    _check_disk(stand, 5)


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "_ROUND_SEC", 0.05)


async def test_a_busy_host_is_looked_after_too(
    short_rounds: None, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There always is a sandbox to consider, and what is due fails."""
    looked: list[float] = []

    async def tend(idle: float) -> None:
        looked.append(idle)
        raise OSError("refused")

    monkeypatch.setattr(stand.host._driver, "tend", tend)
    async with asyncio.timeout(20):
        while len(looked) < 2:
            stand.host._housekeeper.consider(stand.sandbox)
            await asyncio.sleep(0.01)
