"""Manifests: round trip, damage, digests of sparse files."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.images import manifest
from wrenn_sandbox.host.images.manifest import FileDigest, HardwareProfile, Manifest
from wrenn_sandbox.ids import ImageId, is_id

COLD = Manifest(
    image_id=ImageId("img-" + "a" * 20),
    created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    name="minimal",
    recipe_sha256="00",
    files={name: FileDigest(1, "ff") for name in ("kernel", "initrd", "runtime", "disk")},
    kernel_args="quiet",
    vcpus=1,
    memory_mb=512,
    disk_mb=64,
)
SNAPSHOT = msgspec.structs.replace(
    COLD,
    base_image_id=ImageId("img-" + "b" * 20),
    files={name: FileDigest(1, "ff") for name in ("vmstate", "memory", "disk")},
    machine=HardwareProfile(
        vcpus=1,
        memory_mb=512,
        cpu_model="max",
        accelerator="tcg",
        vmm="qemu",
        vmm_version="7.2.22",
        network="tap",
        kernel_sha256="aa",
    ),
)


PAGES = msgspec.structs.replace(
    SNAPSHOT,
    memory_base_id=ImageId("img-" + "c" * 20),
    files={
        name: FileDigest(1, blake3="ff")
        for name in ("vmstate", "memory.idx", "memory.diff", "disk")
    },
)


@pytest.mark.parametrize("original", [COLD, SNAPSHOT, PAGES])
def test_a_manifest_is_read_as_it_was_written(original: Manifest) -> None:
    assert manifest.decode(manifest.encode(original)) == original


def test_the_disk_of_each_kind() -> None:
    assert (COLD.is_cold, COLD.disk_size) == (True, 64 << 20)
    assert not SNAPSHOT.is_cold


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" + data,
        lambda data: data.replace(b'"kernel"', b'"kernal"'),
        lambda data: data.replace(
            b'"kernel":', b'"../../etc/passwd": {"size":1,"sha256":""}, "kernel":'
        ),
        lambda data: data.replace(b"img-", b"../-"),
        lambda data: data.replace(b'"base_image_id": null', b'"base_image_id": "img-x"'),
        lambda data: b"[]",
    ],
)
def test_damage_is_refused(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(IncompatibleImage):
        manifest.decode(damage(manifest.encode(COLD)))


@pytest.mark.parametrize(
    "damaged",
    [
        msgspec.structs.replace(PAGES, memory_base_id=ImageId("../img")),
        msgspec.structs.replace(PAGES, private=True),
        msgspec.structs.replace(PAGES, memory_base_id=None),
        msgspec.structs.replace(SNAPSHOT, memory_base_id=PAGES.memory_base_id),
        msgspec.structs.replace(COLD, memory_base_id=PAGES.memory_base_id),
    ],
)
def test_pages_without_the_memory_that_they_are_over_are_refused(damaged: Manifest) -> None:
    with pytest.raises(IncompatibleImage):
        manifest.decode(manifest.encode(damaged))


def test_another_version_is_refused_by_number() -> None:
    data = manifest.encode(msgspec.structs.replace(COLD, format_version=2))
    with pytest.raises(IncompatibleImage, match="version 2"):
        manifest.decode(data)


def test_digest_depends_on_content_and_not_on_holes(tmp_path: Path) -> None:
    sparse, written = tmp_path / "sparse", tmp_path / "written"
    size, offset = 3_000_000, 1_000_003
    with sparse.open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"data", offset)
    written.write_bytes(bytes(offset) + b"data" + bytes(size - offset - 4))
    assert sparse.stat().st_blocks < written.stat().st_blocks
    assert manifest.content_digest(sparse) == manifest.content_digest(written)


@pytest.mark.parametrize("position", [0, 65_535, 65_536, 199_999])
def test_a_digest_depends_on_every_byte(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(200_000))
    before = manifest.content_digest(path)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\1", position)
    assert manifest.content_digest(path) != before


def test_zeros_of_another_length_are_another_content(tmp_path: Path) -> None:
    digests = set()
    for size in (0, 1, 65_536, 65_537):
        (tmp_path / "file").write_bytes(bytes(size))
        digests.add(manifest.content_digest(tmp_path / "file"))
    assert len(digests) == 4


def test_the_same_block_elsewhere_is_another_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"x" * 65_536 + bytes(65_536))
    second.write_bytes(bytes(65_536) + b"x" * 65_536)
    assert manifest.content_digest(first) != manifest.content_digest(second)


def test_derived_id_follows_the_content() -> None:
    image_id = manifest.derived_id(COLD.files, "fact")
    assert is_id("img", image_id)
    assert manifest.derived_id(dict(reversed(COLD.files.items())), "fact") == image_id
    assert manifest.derived_id(COLD.files, "other") != image_id
    changed = {**COLD.files, "disk": FileDigest(1, "fe")}
    assert manifest.derived_id(changed, "fact") != image_id
