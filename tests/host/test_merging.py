"""A stored sandbox whose pages go into an image of its own: content, crashes, giving up."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from support.host_context import make_context
from support.images import publish
from wrenn_sandbox.errors import Conflict, IncompatibleImage
from wrenn_sandbox.host import merging, paused
from wrenn_sandbox.host.compatibility import profile
from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.manifest import HardwareProfile, Manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.memory.pages import PAGE, Run
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.ids import ImageId, SandboxId, new_image_id

_ID = SandboxId("sb-" + "a" * 20)
_MEMORY_MB = 1
_BASE = {0: b"A", 1: b"B", 9: b"C"}
_OWN = {1: b"b", 2: b"c", 9: b"\0"}


@dataclass
class Stand:
    context: HostContext
    snapshot: Manifest
    stored: PausedSandbox

    @property
    def paths(self) -> Paths:
        return self.context.paths

    def make(self, image_id: ImageId | None = None) -> Manifest:
        return merging.make(self.context, self.stored, image_id or new_image_id(), lambda: None)

    def memory(self, image: Manifest) -> dict[int, bytes]:
        """The first byte of each page that is not zero."""
        data = self.context.store.memory(image).read_bytes()
        assert len(data) == _MEMORY_MB << 20
        pages = range(len(data) // PAGE)
        return {n: data[n * PAGE : n * PAGE + 1] for n in pages if any(data[n * PAGE :][:PAGE])}

    def generations(self) -> set[str]:
        return set(os.listdir(self.paths.stored(_ID)))


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    context = make_context(tmp_path / "data")
    machine = profile(context, 1, _MEMORY_MB, "aa")
    cold = publish(context.store, b"cold")
    snapshot = _snapshot(context.store, cold, machine)
    generation = _generation(context.paths, snapshot, machine)
    return Stand(context, snapshot, generation)


def _snapshot(store: ImageStore, cold: Manifest, machine: HardwareProfile) -> Manifest:
    with store.staging() as made:
        with (made / form.MEMORY).open("wb") as file:
            file.truncate(_MEMORY_MB << 20)
            for page, content in _BASE.items():
                os.pwrite(file.fileno(), content * PAGE, page * PAGE)
        for name in (form.VMSTATE, form.DISK):
            (made / name).write_bytes(b"base")
        files = {path.name: form.describe(path) for path in made.iterdir()}
        return store.publish(
            made,
            msgspec.structs.replace(
                cold,
                image_id=form.derived_id(files),
                base_image_id=cold.image_id,
                memory_mb=_MEMORY_MB,
                machine=machine,
                files=files,
            ),
        )


def _generation(paths: Paths, image: Manifest, machine: HardwareProfile) -> PausedSandbox:
    staged = paused.stage(paths, _ID, 3)
    (staged / form.VMSTATE).write_bytes(b"state")
    (staged / form.DISK).write_bytes(b"layer")
    runs = [Run(1, 2), Run(9, 1)]
    (staged / diff.INDEX).write_bytes(diff.encode_index(runs, (_MEMORY_MB << 20) // PAGE))
    (staged / diff.PAGES).write_bytes(b"".join(_OWN[n] * PAGE for n in sorted(_OWN)))
    manifest = PausedSandbox(
        sandbox_id=_ID,
        generation=3,
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        image_id=image.image_id,
        machine=machine,
        token="secret",
        disk_mb=64,
        files=dict(paused.entries(staged, [path.name for path in staged.iterdir()])),
    )
    paused.commit(paths, manifest)
    return manifest


def test_the_image_holds_what_the_guest_saw(stand: Stand) -> None:
    image = stand.make()
    assert stand.memory(image) == {0: b"A", 1: b"b", 2: b"c"}
    assert stand.memory(stand.snapshot) == _BASE
    store = stand.context.store
    assert store.verify(image.image_id) == image
    assert image.private
    assert store.disk(image) == store.disk(stand.snapshot), "its disk layers build on that"
    assert store.boot_files(image) == store.boot_files(stand.snapshot)
    assert not image.is_cold


def test_an_image_is_never_over_a_private_one(stand: Stand) -> None:
    """So that however often pages are merged, two images are all that a sandbox keeps."""
    first = stand.make()
    stand.stored = paused.refer(stand.paths, stand.stored, first.image_id)
    second = stand.make()
    assert stand.memory(second) == stand.memory(first)
    assert second.base_image_id == first.base_image_id == stand.snapshot.image_id
    store = stand.context.store
    assert store.collect({second.image_id}) == {first.image_id}
    store.open(stand.snapshot.image_id)


def test_pages_over_an_image_of_pages_are_put_into_whole_memory(stand: Stand) -> None:
    """As of a sandbox that was created from a checkpoint."""
    store, paths = stand.context.store, stand.paths
    with store.staging() as made:
        for name in (form.VMSTATE, form.DISK):
            (made / name).write_bytes(b"checkpoint")
        pages = (_MEMORY_MB << 20) // PAGE
        (made / diff.INDEX).write_bytes(diff.encode_index([Run(0, 2), Run(5, 1)], pages))
        (made / diff.PAGES).write_bytes(b"x" * PAGE + b"y" * PAGE + b"z" * PAGE)
        checkpoint = store.publish(
            made,
            msgspec.structs.replace(
                stand.snapshot,
                image_id=new_image_id(),
                memory_base_id=stand.snapshot.image_id,
                files={path.name: form.describe(path) for path in made.iterdir()},
            ),
        )
    stand.stored = paused.refer(paths, stand.stored, checkpoint.image_id)
    assert stand.memory(stand.make()) == {0: b"x", 1: b"y", 5: b"z", 9: b"C"}
    assert store.collect({checkpoint.image_id}).isdisjoint({stand.snapshot.image_id})


def test_the_sandbox_refers_to_it(stand: Stand) -> None:
    image = stand.make()
    after = paused.refer(stand.paths, stand.stored, image.image_id)
    assert paused.newest(stand.paths, _ID) == after
    assert stand.generations() == {"4"}
    paused.check(stand.paths, after)
    directory = stand.paths.generation(_ID, 4)
    assert (directory / form.VMSTATE).read_bytes() == b"state"
    assert (directory / form.DISK).read_bytes() == b"layer"
    assert diff.decode_index((directory / diff.INDEX).read_bytes(), 256) == []
    assert (directory / diff.PAGES).stat().st_size == 0
    assert (after.token, after.image_id) == ("secret", image.image_id)


@pytest.mark.parametrize("step", ["link", "fsync", "rename"])
def test_a_switch_that_fails_leaves_the_old_state(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    image = stand.make()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", full)
        else:
            patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space"):
            paused.refer(stand.paths, stand.stored, image.image_id)
    assert stand.generations() == {"3"}
    assert paused.newest(stand.paths, _ID) == stand.stored
    paused.check(stand.paths, stand.stored)


def test_a_crash_after_the_switch_leaves_the_new_state(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = stand.make()
    with monkeypatch.context() as patch:
        patch.setattr(paused, "keep", lambda *_: None)
        after = paused.refer(stand.paths, stand.stored, image.image_id)
    assert stand.generations() == {"3", "4"}
    assert paused.newest(stand.paths, _ID) == after
    paused.check(stand.paths, after)


@pytest.mark.parametrize("calls", range(1, 5))
def test_work_that_is_given_up_leaves_nothing(stand: Stand, calls: int) -> None:
    left = [calls]

    def check() -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise Conflict("The sandbox is wanted")

    before = set(os.listdir(stand.paths.images))
    with pytest.raises(Conflict):
        merging.make(stand.context, stand.stored, new_image_id(), check)
    assert set(os.listdir(stand.paths.images)) == before
    paused.check(stand.paths, stand.stored)


def test_damaged_pages_are_not_merged(stand: Stand) -> None:
    path = stand.paths.generation(_ID, 3) / diff.PAGES
    path.write_bytes(b"X" * path.stat().st_size)
    before = set(os.listdir(stand.paths.images))
    with pytest.raises(IncompatibleImage):
        stand.make()
    assert set(os.listdir(stand.paths.images)) == before


def test_layers_are_noted_in_the_same_generation(stand: Stand) -> None:
    for layer in (1, 2):
        stand.paths.generation(_ID, layer).mkdir()
        (stand.paths.generation(_ID, layer) / form.DISK).write_bytes(b"old")
    chained = paused.note_layers(stand.paths, stand.stored, (1, 2))
    flat = stand.paths.images / "flat"
    flat.write_bytes(b"flat")
    paused.replace_disk(stand.paths, _ID, 2, flat)
    assert paused.newest(stand.paths, _ID) == chained
    paused.check(stand.paths, chained)
    after = paused.note_layers(stand.paths, chained, (2,))
    paused.drop(stand.paths, _ID, (1,))
    assert stand.generations() == {"2", "3"}
    assert paused.newest(stand.paths, _ID) == after
    paused.check(stand.paths, after)
    assert (stand.paths.generation(_ID, 2) / form.DISK).read_bytes() == b"flat"
