"""What is stored, damaged in any way: refused with a clear error, never continued as another."""

import os
import random
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host import paused
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.manifest import FileDigest, HardwareProfile, Manifest
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.memory.pages import PAGE, Run
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.ids import ImageId, SandboxId

_ID = SandboxId("sb-" + "a" * 20)
_PAGES = 1000
_RUNS = [Run(0, 3), Run(10, 1), Run(500, 40), Run(999, 1)]
_NAMES = ("vmstate", "memory.idx", "memory.diff", "disk")
_MACHINE = HardwareProfile(
    vcpus=1,
    memory_mb=512,
    cpu_model="max",
    accelerator="tcg",
    vmm="qemu",
    vmm_version="7.2.22",
    network="tap",
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "data")
    paths.prepare()
    return paths


def _fill(directory: Path) -> None:
    (directory / "memory.idx").write_bytes(diff.encode_index(_RUNS, _PAGES))
    (directory / "memory.diff").write_bytes(b"".join(b"%04d" % n * 1024 for n in range(45)))
    for name in ("vmstate", "disk"):
        (directory / name).write_bytes(os.urandom(5000))


@pytest.fixture
def manifest(paths: Paths) -> PausedSandbox:
    directory = paused.stage(paths, _ID, 1)
    _fill(directory)
    manifest = PausedSandbox(
        sandbox_id=_ID,
        generation=1,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        image_id=ImageId("img-" + "b" * 20),
        machine=_MACHINE,
        token="secret",
        disk_mb=64,
        files=dict(paused.entries(directory, _NAMES)),
    )
    paused.commit(paths, manifest)
    return manifest


@pytest.mark.parametrize("name", _NAMES)
def test_any_byte_that_changed_is_seen(name: str, paths: Paths, manifest: PausedSandbox) -> None:
    path = paths.generation(_ID, 1) / name
    whole = path.read_bytes()
    choose = random.Random(1)
    for _ in range(40):
        data = bytearray(whole)
        match choose.randrange(3):
            case 0:
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            case 1:
                del data[choose.randrange(len(data)) :]
            case 2:
                data += b"\0" * choose.randint(1, 9000)
        path.write_bytes(data)
        with pytest.raises(IncompatibleImage) as caught:
            paused.check(paths, manifest)
        assert str(paths.data_dir) not in str(caught.value)
    path.write_bytes(whole)
    paused.check(paths, manifest)


_Change = Callable[[dict[str, object]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(generation=2),
        lambda m: m.update(generation=-1),
        lambda m: m.update(sandbox_id="sb-" + "c" * 20),
        lambda m: m.update(image_id="../../../etc"),
        lambda m: m.update(files={}),
        lambda m: m.update(files={"../../secret": {"size": 1, "sha256": ""}}),
        lambda m: m["files"].pop("memory.diff"),
        lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}),
        lambda m: m.update(layers=["../x"]),
        lambda m: m.update(format_version=2),
        lambda m: m.update(created_at="never"),
        lambda m: m.pop("machine"),
    ],
)
def test_manifests_that_are_not_the_sandbox_s(
    change: _Change, paths: Paths, manifest: PausedSandbox
) -> None:
    path = paths.generation(_ID, 1) / "manifest.json"
    data = msgspec.json.decode(path.read_bytes())
    change(data)
    path.write_bytes(msgspec.json.encode(data))
    with pytest.raises(IncompatibleImage):
        paused.newest(paths, _ID)


def test_garbled_manifests_of_paused_sandboxes_are_refused(
    paths: Paths, manifest: PausedSandbox
) -> None:
    path = paths.generation(_ID, 1) / "manifest.json"
    whole = path.read_bytes()
    choose = random.Random(2)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(choose.randint(1, 3)):
            at = choose.randrange(len(data))
            if choose.random() < 0.2:
                data[at:at] = choose.choice((b"[" * 3000, b"\xff", b'"', b"}", b"\0"))
            else:
                data[at] = choose.randrange(256)
        path.write_bytes(data)
        try:
            found = paused.newest(paths, _ID)
        except IncompatibleImage:
            continue
        assert found is not None
        assert found.files.keys() == set(_NAMES)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(IncompatibleImage):
        paused.newest(paths, _ID)


@given(st.binary(max_size=200))
def test_an_index_of_any_bytes(data: bytes) -> None:
    with pytest.raises(IncompatibleImage):
        diff.decode_index(data, _PAGES)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=20))
def test_an_index_of_any_runs(runs: list[tuple[int, int]]) -> None:
    """What is accepted lies in the guest's memory, in order and once."""
    head = struct.pack("<4sIIII", b"WRMI", 1, PAGE, _PAGES, len(runs))
    data = head + b"".join(struct.pack("<II", *run) for run in runs)
    try:
        found = diff.decode_index(data, _PAGES)
    except IncompatibleImage:
        return
    end = 0
    for run in found:
        assert run.first >= end
        end = run.first + run.count
    assert end <= _PAGES


def test_pages_that_do_not_fit_their_index(tmp_path: Path) -> None:
    """The image is not written to: neither too few pages nor too many."""
    _fill(tmp_path)
    image = tmp_path / "image"
    image.write_bytes(bytes(_PAGES * PAGE))
    before = image.read_bytes()
    pages = tmp_path / "memory.diff"
    for size in (0, 45 * PAGE - 1, 46 * PAGE, 2**40):
        os.truncate(pages, size)
        with pytest.raises(IncompatibleImage):
            diff.merge(tmp_path, image)
    assert image.read_bytes() == before


def test_an_index_of_any_size_is_read_within_bounds(tmp_path: Path) -> None:
    _fill(tmp_path)
    os.truncate(tmp_path / "memory.idx", 2**40)
    image = tmp_path / "image"
    image.write_bytes(bytes(_PAGES * PAGE))
    with pytest.raises(IncompatibleImage):
        diff.merge(tmp_path, image)


def test_garbled_manifests_of_images_are_refused() -> None:
    original = Manifest(
        image_id=ImageId("img-" + "a" * 20),
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        name="minimal",
        recipe_sha256="00",
        files={name: FileDigest(1, "ff") for name in ("kernel", "initrd", "runtime", "disk")},
        kernel_args="quiet",
        vcpus=1,
        memory_mb=512,
        disk_mb=64,
    )
    whole = form.encode(original)
    choose = random.Random(3)
    for _ in range(300):
        data = bytearray(whole)
        data[choose.randrange(len(data))] = choose.randrange(256)
        if choose.random() < 0.1:
            data[5:5] = b"[" * 5000
        try:
            found = form.decode(bytes(data))
        except IncompatibleImage:
            continue
        assert found.files.keys() >= original.files.keys()
        assert all("/" not in name for name in found.files)
