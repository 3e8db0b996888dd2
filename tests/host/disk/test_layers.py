"""Chains of disk layers put together, as QEMU's own tools see the result."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from support.qcow2 import info, is_clean, qemu_io
from wrenn_sandbox.errors import Conflict
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.disk.qcow2 import layers, overlay, reader

_MB = 1 << 20
_KB = 1 << 10


@pytest.fixture
def chain(tmp_path: Path, base: Path) -> list[Path]:
    """Three layers over the base, oldest first; the second and the third zero what is below."""
    made = [tmp_path / name for name in ("variant", "first", "second")]
    below, form = base, "raw"
    for number, layer in enumerate(made):
        overlay.create(layer, below=Disk(below, raw=form == "raw"), size=4 * _MB)
        qemu_io(layer, f"write -P {number + 1} {number}M 64k")
        below, form = layer, "qcow2"
    qemu_io(made[1], "write -z 3M 64k")
    qemu_io(made[2], "write -z 64k 64k", "write -z 0 4k")
    return made


def _put_together(chain: list[Path], target: Path, base: Path, size: int = 4 * _MB) -> None:
    layers.put_together(chain, target, below=Disk(base, raw=True), size=size)


def _check(layer: Path, base: Path) -> None:
    assert info(layer)["backing-filename"] == str(base)
    assert info(layer)["backing-filename-format"] == "raw"
    assert is_clean(layer)
    qemu_io(
        layer,
        "read -P 0 0 4k",
        "read -P 1 4k 60k",
        "read -P 0 64k 64k",
        "read -P 2 1M 64k",
        "read -P 3 2M 64k",
        "read -P 0x77 2112k 960k",
        "read -P 0 3M 64k",
        "read -P 0x77 3136k 960k",
    )
    assert layer.stat().st_blocks * 512 < _MB


def test_a_layer_holds_all_that_a_chain_does(tmp_path: Path, base: Path, chain: list[Path]) -> None:
    """Also what only an older layer of a sandbox that was paused before holds."""
    target = tmp_path / "flat"
    _put_together(chain, target, base)
    for layer in chain:
        os.unlink(layer)
    assert target.stat().st_mode & 0o777 == 0o600
    _check(target, base)
    reader.require(target, [Disk(base, raw=True)], 4 * _MB)


def test_a_layer_takes_the_place_of_a_chain(tmp_path: Path, base: Path, chain: list[Path]) -> None:
    """A machine that has the chain open goes on with what it opened."""
    top = tmp_path / "top"
    overlay.create(top, below=Disk(chain[-1], raw=False), size=4 * _MB)
    qemu_io(top, "write -P 9 256k 64k")
    target = tmp_path / "flat"
    _put_together(chain, target, base)
    target.rename(chain[-1])
    for layer in chain[:-1]:
        os.unlink(layer)
    _check(chain[-1], base)
    assert is_clean(top)
    qemu_io(top, "read -P 9 256k 64k", "read -P 1 4k 60k", "read -P 2 1M 64k")


def test_a_layer_of_an_image_finds_its_base_wherever_both_are(tmp_path: Path, base: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    overlay.create(tmp_path / "layer", below=Disk(base, raw=True), size=4 * _MB)
    qemu_io(tmp_path / "layer", "write -P 0x11 0 64k")
    layers.put_together(
        [tmp_path / "layer"],
        made / "disk",
        below=Disk(Path("../cold/disk"), raw=True),
        size=4 * _MB,
    )
    assert info(made / "disk")["backing-filename"] == "../cold/disk"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "cold").rename(moved / "cold")
    made.rename(moved / "made")
    assert is_clean(moved / "made" / "disk")
    qemu_io(moved / "made" / "disk", "read -P 0x11 0 64k", "read -P 0x77 2M 2M")


def test_layers_without_anything(tmp_path: Path, base: Path) -> None:
    layer = tmp_path / "layer"
    overlay.create(layer, below=Disk(base, raw=True), size=4 * _MB)
    _put_together([layer], tmp_path / "flat", base)
    assert is_clean(tmp_path / "flat")
    qemu_io(tmp_path / "flat", "read -P 0 0 2M", "read -P 0x77 2M 2M")


def test_a_disk_of_many_tables(tmp_path: Path) -> None:
    """More than one second-level table and more clusters than a block of counts is for."""
    size = 40 * 1024 * _MB
    base = tmp_path / "disk"
    base.touch()
    os.truncate(base, size)
    layer, target = tmp_path / "layer", tmp_path / "flat"
    overlay.create(layer, below=Disk(base, raw=True), size=size)
    places = [0, 511, 512, 513, 20_000, 40_959]
    qemu_io(layer, *(f"write -P {number + 1} {each}M 1M" for number, each in enumerate(places)))
    qemu_io(layer, "write -z 1G 1G")
    _put_together([layer], target, base, size)
    assert is_clean(target)
    qemu_io(target, *(f"read -P {number + 1} {each}M 1M" for number, each in enumerate(places)))


def test_more_clusters_than_one_block_of_counts_is_for(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse data of more than 2 GiB: the layer's clusters are there but hold nothing."""
    size = 3 * 1024 * _MB
    os.truncate(base, size)
    layer, target = tmp_path / "layer", tmp_path / "flat"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", layer, "3G"],
        check=True,
    )
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "raw", layer], check=True
    )

    def hole(_source: int, _target: int, count: int, _start: int, _to: int) -> int:
        return count

    monkeypatch.setattr(layers, "_move", hole)
    _put_together([layer], target, base, size)
    assert is_clean(target)
    qemu_io(target, "read -P 0 0 2M", "read -P 0 2M 64k", "read -P 0 3071M 1M")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_was_written_is_found(tmp_path: Path, base: Path, seed: int) -> None:
    """Byte for byte what QEMU reads through the chain."""
    choose = random.Random(seed)
    chain: list[Path] = []
    below, form = base, "raw"
    for number in range(choose.randint(1, 4)):
        layer = tmp_path / f"layer{number}"
        overlay.create(layer, below=Disk(below, raw=form == "raw"), size=4 * _MB)
        commands = []
        for _ in range(choose.randint(0, 12)):
            start = choose.randrange(0, 4 * _MB, 4 * _KB)
            length = min(choose.choice((4, 64, 200, 900)) * _KB, 4 * _MB - start)
            what = choose.choice(("write -z", "write -z -u", f"write -P {choose.randint(1, 255)}"))
            commands.append(f"{what} {start} {length}")
            if choose.random() < 0.2:
                commands.append(f"discard {start} {length}")
        qemu_io(layer, *commands, "flush")
        chain.append(layer)
        below, form = layer, "qcow2"
    target = tmp_path / "flat"
    _put_together(chain, target, base)
    assert is_clean(target)
    assert _whole(target) == _whole(chain[-1])


def _whole(layer: Path) -> bytes:
    raw = layer.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(layer), str(raw)], check=True)
    return raw.read_bytes()


def test_layers_are_copied_where_the_file_system_cannot_share(
    tmp_path: Path, base: Path, chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(18, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refused)
    _put_together(chain, tmp_path / "flat", base)
    _check(tmp_path / "flat", base)


def test_work_that_is_given_up(tmp_path: Path, base: Path, chain: list[Path]) -> None:
    def enough() -> None:
        raise Conflict("enough")

    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Conflict):
        layers.put_together(
            chain,
            tmp_path / "flat",
            below=Disk(base, raw=True),
            size=4 * _MB,
            check=enough,
        )
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_nothing_is_written_over(tmp_path: Path, base: Path, chain: list[Path]) -> None:
    target = tmp_path / "flat"
    shutil.copy(chain[0], target)
    with pytest.raises(FileExistsError):
        _put_together(chain, target, base)
