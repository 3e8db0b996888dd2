"""What sandboxes take on the disk: their own files, and images that are there for them alone."""

import os
from pathlib import Path

import msgspec
import pytest

from support.images import publish, publish_snapshot, snapshot
from wrenn_sandbox.host import disk_use
from wrenn_sandbox.host.disk_use import Holding, allocated, held_open, measure
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.ids import new_machine_id, new_sandbox_id


@pytest.fixture
def store(paths: Paths) -> ImageStore:
    return ImageStore(paths)


def publish_variant(store: ImageStore, base: Manifest, content: bytes) -> Manifest:
    with store.staging() as made:
        image = msgspec.structs.replace(snapshot(made, base, content), variant=True)
        return store.publish(made, image)


def test_allocated_is_not_apparent(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 8192)
        file.flush()
        os.fsync(file.fileno())
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link").symlink_to("/proc/kcore")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert 8192 <= allocated(tmp_path) < 1 << 20
    assert allocated(tmp_path / "missing") == 0
    assert allocated(tmp_path / "sparse") == 0


def test_what_a_process_keeps_of_files_without_a_name_is_counted_once(tmp_path: Path) -> None:
    before = held_open(os.getpid(), tmp_path)
    path = tmp_path / "layer"
    path.write_bytes(b"x" * (1 << 20))
    with path.open("rb"), path.open("rb"):
        assert held_open(os.getpid(), tmp_path) == before, "it has a name"
        path.unlink()
        assert held_open(os.getpid(), tmp_path) - before == 1 << 20
    assert held_open(os.getpid(), tmp_path) == before


def test_machine_and_what_is_stored_count(paths: Paths, store: ImageStore) -> None:
    running, stored, new = (
        Holding(new_sandbox_id(), new_machine_id(), None),
        Holding(new_sandbox_id(), None, None),
        Holding(new_sandbox_id(), None, None),
    )
    assert running.machine_id is not None
    for directory, size in (
        (paths.machine(running.machine_id).directory, 3),
        (paths.generation(running.sandbox_id, 1), 2),
        (paths.generation(stored.sandbox_id, 4), 7),
    ):
        directory.mkdir(parents=True)
        (directory / "disk").write_bytes(os.urandom(size << 20))
    found = measure(paths, store, [running, stored, new], 8)
    assert {each: size >> 20 for each, size in found.items()} == {
        running.sandbox_id: 5,
        stored.sandbox_id: 7,
        new.sandbox_id: 0,
    }


def test_images_that_only_sandboxes_need_are_shared_out(paths: Paths, store: ImageStore) -> None:
    base = publish(store, b"base", "minimal")
    held = publish_snapshot(store, base, b"held")
    store.hold(held.image_id)
    nameless = publish_snapshot(store, base, os.urandom(1 << 20))
    recent = publish_variant(store, base, b"recent")
    old = publish_variant(store, base, os.urandom(1 << 20))
    os.utime(store.directory(old.image_id), (1, 1))
    holdings = [
        Holding(new_sandbox_id(), None, image.image_id)
        for image in (held, nameless, nameless, recent, old)
    ]
    sizes = list(measure(paths, store, holdings, variants=1).values())
    assert (sizes[0], sizes[3]) == (0, 0)
    whole = allocated(store.directory(nameless.image_id))
    assert sizes[1] == sizes[2] == whole // 2 >= 1 << 20
    assert sizes[4] == allocated(store.directory(old.image_id)) >= 1 << 20
    paths.template("minimal").unlink()
    unnamed = measure(paths, store, holdings, variants=1)
    assert unnamed[holdings[3].sandbox_id] > 0, "nobody else needs its base either"


def test_an_image_that_cannot_be_read_counts_nothing(paths: Paths, store: ImageStore) -> None:
    base = publish(store, b"base", "minimal")
    image = publish_snapshot(store, base, b"one")
    (store.directory(image.image_id) / "memory").unlink()
    holding = Holding(new_sandbox_id(), None, image.image_id)
    assert disk_use.measure(paths, store, [holding], 1) == {holding.sandbox_id: 0}


def test_of_the_variants_the_last_used_are_kept(store: ImageStore) -> None:
    base = publish(store, b"base", "minimal")
    first, second, third = (publish_variant(store, base, text) for text in (b"1", b"2", b"3"))
    for age, each in enumerate((third, second, first)):
        os.utime(store.directory(each.image_id), (1000 - age, 1000 - age))
    store.use(first.image_id)
    assert store.kept(2) == {base.image_id, first.image_id, third.image_id}
    assert store.collect({second.image_id}, variants=2) == set()
    assert store.collect(set(), variants=2) == {second.image_id}
    assert store.collect(set(), variants=None) == set()
