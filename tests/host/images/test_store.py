"""The image store: publishing whole or not at all, names, collection, leftovers, races."""

import os
import threading

import pytest

from support.images import cold, fill, publish, publish_snapshot
from wrenn_sandbox.errors import IncompatibleImage, InvalidRequest, NotFound
from wrenn_sandbox.host.images import manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.ids import ImageId


@pytest.fixture
def store(paths: Paths) -> ImageStore:
    return ImageStore(paths)


def test_a_published_image_is_read_back_and_immutable(store: ImageStore) -> None:
    made = publish(store, b"one", "minimal")
    assert store.resolve("minimal") == made
    assert store.verify(made.image_id) == made
    directory = store.directory(made.image_id)
    assert {p.stat().st_mode & 0o777 for p in directory.iterdir()} == {0o444}
    assert directory.stat().st_mode & 0o777 == 0o755
    assert store.size(made.image_id) > 0


def test_an_unpublished_directory_leaves_nothing(store: ImageStore, paths: Paths) -> None:
    with store.staging() as made:
        fill(made, ("disk",), b"half")
    assert list(paths.images.iterdir()) == []


def test_publishing_the_same_again_keeps_the_first(store: ImageStore, paths: Paths) -> None:
    first = publish(store, b"one")
    inode = store.disk(first).stat().st_ino
    assert publish(store, b"one", "minimal").image_id == first.image_id
    assert store.disk(first).stat().st_ino == inode
    assert len(list(paths.images.iterdir())) == 1


def test_publishing_again_replaces_a_damaged_image(store: ImageStore) -> None:
    first = publish(store, b"one")
    disk = store.disk(first)
    disk.chmod(0o644)
    disk.write_bytes(b"X" * disk.stat().st_size)
    with pytest.raises(IncompatibleImage, match="disk is damaged"):
        store.verify(first.image_id)
    publish(store, b"one")
    store.verify(first.image_id)


def test_files_that_do_not_fit_the_manifest_are_not_published(store: ImageStore) -> None:
    with store.staging() as made:
        described = cold(made, b"one")
        (made / "disk").write_bytes(b"cut")
        with pytest.raises(IncompatibleImage):
            store.publish(made, described)


@pytest.mark.parametrize("name", ["kernel", "disk", "manifest.json"])
def test_a_missing_or_short_file_is_noticed(store: ImageStore, name: str) -> None:
    made = publish(store, b"one", "minimal")
    path = store.directory(made.image_id) / name
    path.chmod(0o644)
    path.write_bytes(b"")
    with pytest.raises(IncompatibleImage) as error:
        store.open(made.image_id)
    assert "/" not in str(error.value)
    assert store.templates() == []


def test_unknown_names_and_ids(store: ImageStore) -> None:
    with pytest.raises(NotFound):
        store.resolve("none")
    with pytest.raises(NotFound):
        store.open(ImageId("img-" + "a" * 20))
    with pytest.raises(NotFound):
        store.open(ImageId("../../etc"))
    with pytest.raises(InvalidRequest):
        store.resolve("../../etc/passwd")


def test_a_name_moves_to_what_is_published_last(store: ImageStore) -> None:
    first, second = publish(store, b"one", "minimal"), publish(store, b"two", "minimal")
    assert store.resolve("minimal") == second
    assert publish(store, b"one", "minimal") == first
    assert [(each.name, each.manifest) for each in store.templates()] == [("minimal", first)]


def test_collect_keeps_what_is_named_used_or_a_base(store: ImageStore) -> None:
    named, used = publish(store, b"named", "minimal"), publish(store, b"used")
    base, unused = publish(store, b"base"), publish(store, b"unused")
    child = publish_snapshot(store, base, b"child")
    assert store.collect({used.image_id, child.image_id}) == {unused.image_id}
    for kept in (named, used, base, child):
        store.open(kept.image_id)
    assert store.boot_files(child).kernel == store.file(base, "kernel")
    assert store.disk(child) == store.file(child, "disk")
    assert store.collect(set()) == {used.image_id, base.image_id, child.image_id}


def test_collect_removes_nothing_while_a_needed_image_is_unreadable(store: ImageStore) -> None:
    base = publish(store, b"base")
    child = publish_snapshot(store, base, b"child")
    path = store.directory(child.image_id) / manifest.FILE_NAME
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 9'))
    assert store.collect({child.image_id}) == set()
    store.open(base.image_id)


def test_collect_removes_nothing_while_the_disk_gives_an_image_not_back(store: ImageStore) -> None:
    base = publish(store, b"base")
    child = publish_snapshot(store, base, b"child")
    path = store.directory(child.image_id) / manifest.FILE_NAME
    path.unlink()
    path.mkdir()  # reading it fails, as with a bad sector
    assert store.collect({child.image_id}) == set()
    store.open(base.image_id)


def test_sweep_removes_leftovers_and_spares_a_live_build(store: ImageStore, paths: Paths) -> None:
    left = paths.images / ".staging-dead"
    left.mkdir()
    (left / "disk").write_bytes(b"half")
    (paths.images / ".trash-dead").mkdir()
    (paths.cache / ".staging-dead").mkdir()
    (paths.templates / ".minimal.json.0.new").write_bytes(b"")
    kept = publish(store, b"one", "minimal")
    with store.staging() as live:
        assert store.sweep() == 4
        assert live.is_dir()
    assert store.resolve("minimal") == kept
    assert store.sweep() == 0


def test_builds_at_the_same_time_publish_one_image(store: ImageStore, paths: Paths) -> None:
    start = threading.Barrier(4)
    made: list[ImageId] = []

    def build() -> None:
        start.wait()
        made.append(publish(store, b"one", "minimal").image_id)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [made[0]] * 4
    assert os.listdir(paths.images) == [made[0]]


@pytest.mark.parametrize("name", [manifest.MEMORY, manifest.VMSTATE])
def test_a_changed_byte_of_what_machines_continue_is_noticed(
    store: ImageStore, paths: Paths, name: str
) -> None:
    image = publish_snapshot(store, publish(store, b"base"), b"state")
    path = store.file(image, name)
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert store.open(image.image_id) == image
    with pytest.raises(IncompatibleImage):
        ImageStore(paths).open_sound(image.image_id)
    path.write_bytes(data)
    assert store.open_sound(image.image_id) == image
