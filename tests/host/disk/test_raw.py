"""Disks without layers: whole copies, whatever their guest has written."""

import os
from pathlib import Path

import pytest

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.disk.raw import Raw
from wrenn_sandbox.host.memory import sparse

_SIZE = 64 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "disk"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(b"QFI\xfb" + b"x" * 4092)  # a guest may write what looks like another format
        file.seek(_SIZE - 4096)
        file.write(b"end".ljust(4096))
    return path


def test_a_new_disk_holds_what_is_below_and_has_its_holes(tmp_path: Path, base: Path) -> None:
    layer = tmp_path / "disk"
    Raw().create(layer, Disk(Path("images/disk"), raw=True), _SIZE)
    assert layer.read_bytes() == base.read_bytes()
    assert layer.stat().st_blocks * 512 < 1 << 20
    assert layer.stat().st_mode & 0o777 == 0o600
    Raw().require(layer, [], _SIZE)


def test_writing_to_a_disk_leaves_the_one_below_alone(tmp_path: Path, base: Path) -> None:
    before = base.read_bytes()
    layer = tmp_path / "disk"
    Raw().create(layer, Disk(base, raw=False), _SIZE)
    with layer.open("r+b") as file:
        file.write(b"other")
    assert base.read_bytes() == before


def test_a_disk_of_another_size_is_nothing_to_copy(tmp_path: Path, base: Path) -> None:
    with pytest.raises(OSError, match="bytes instead of"):
        Raw().create(tmp_path / "disk", Disk(base, raw=True), _SIZE * 2)
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("change", ["shorter", "longer", "link", "fifo", "missing"])
def test_what_is_not_the_whole_disk_is_refused(tmp_path: Path, base: Path, change: str) -> None:
    layer = tmp_path / "disk"
    if change in ("shorter", "longer"):
        layer.touch()
        os.truncate(layer, _SIZE + (1 if change == "longer" else -1))
    elif change == "link":
        layer.symlink_to(base)
    elif change == "fifo":
        os.mkfifo(layer)
    with pytest.raises(FileNotFoundError if change == "missing" else IncompatibleImage):
        Raw().require(layer, [], _SIZE)
    with pytest.raises((OSError, IncompatibleImage)):
        Raw().merge((layer,), tmp_path / "merged", Disk(base, raw=True), _SIZE)


def test_the_newest_of_a_chain_is_all_that_counts(tmp_path: Path, base: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    Raw().create(old, Disk(base, raw=True), _SIZE)
    Raw().create(new, Disk(base, raw=True), _SIZE)
    with new.open("r+b") as file:
        file.write(b"new")
    merged = tmp_path / "merged"
    Raw().merge((old, new), merged, Disk(base, raw=True), _SIZE)
    assert merged.read_bytes() == new.read_bytes()


def test_a_copy_of_a_raw_disk_can_be_given_up(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it takes its time: a file system that shares blocks is done at once."""

    class Enough(Exception):
        pass

    def check() -> None:
        raise Enough

    monkeypatch.setattr(sparse, "shared", lambda *_: False)
    with pytest.raises(Enough):
        Raw().create(tmp_path / "disk", Disk(base, raw=True), _SIZE, check)
    with pytest.raises(Enough):
        Raw().merge((base,), tmp_path / "merged", Disk(base, raw=True), _SIZE, check)


def test_a_copy_of_a_raw_disk_asks_for_the_room_that_it_takes(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    shares = True
    monkeypatch.setattr(sparse, "shared", lambda *_: shares)
    Raw().create(tmp_path / "shared", Disk(base, raw=True), _SIZE, room=asked.append)
    shares = False
    Raw().create(tmp_path / "copied", Disk(base, raw=True), _SIZE, room=asked.append)
    assert asked == [base.stat().st_blocks * 512]
