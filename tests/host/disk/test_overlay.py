"""Disk layers as QEMU's own tools see them."""

from pathlib import Path

import pytest

from support.qcow2 import info, is_clean, qemu_io
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.disk.qcow2 import overlay

_MB = 1 << 20


@pytest.mark.parametrize("size_mb", [4, 512, 10 * 1024, 2 * 1024 * 1024])
def test_an_empty_layer(tmp_path: Path, base: Path, size_mb: int) -> None:
    layer = tmp_path / "layer"
    overlay.create(layer, below=Disk(base, raw=True), size=size_mb * _MB)
    assert is_clean(layer)
    found = info(layer)
    assert found["virtual-size"] == size_mb * _MB
    assert found["backing-filename"] == str(base)
    assert found["backing-filename-format"] == "raw"
    assert layer.stat().st_mode & 0o777 == 0o600
    assert layer.stat().st_blocks * 512 < _MB
    qemu_io(layer, "read -P 0 0 2M", "read -P 0x77 2M 2M")


def test_what_is_written_to_a_layer_stays_in_it(tmp_path: Path, base: Path) -> None:
    before = base.read_bytes()
    layer, top = tmp_path / "layer", tmp_path / "top"
    overlay.create(layer, below=Disk(base, raw=True), size=4 * _MB)
    qemu_io(layer, "write -P 0x11 1M 1M")
    overlay.create(top, below=Disk(layer, raw=False), size=4 * _MB)
    qemu_io(top, "write -P 0x22 3M 64k", "write -z 2M 64k")
    qemu_io(
        top,
        "read -P 0 0 1M",
        "read -P 0x11 1M 1M",
        "read -P 0 2M 64k",
        "read -P 0x22 3M 64k",
        "read -P 0x77 3136k 960k",
    )
    qemu_io(layer, "read -P 0x77 2M 2M")
    assert base.read_bytes() == before
    assert is_clean(layer)
    assert is_clean(top)


def test_a_layer_is_never_written_over(tmp_path: Path, base: Path) -> None:
    layer = tmp_path / "layer"
    layer.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        overlay.create(layer, below=Disk(base, raw=True), size=4 * _MB)
    assert layer.read_bytes() == b"mine"


def test_paths_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        overlay.create(tmp_path / "layer", below=Disk(Path("/" + "x" * 1023), raw=True), size=_MB)
    assert not (tmp_path / "layer").exists()
