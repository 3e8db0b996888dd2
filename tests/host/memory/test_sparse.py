"""Copies of sparse files."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from wrenn_sandbox.errors import Conflict
from wrenn_sandbox.host.memory import sparse

_MB = 1 << 20


def _file(path: Path, size: int, *places: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for place in places:
            os.pwrite(file.fileno(), b"data", place)
    return path


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        sparse.clone(read.fileno(), write.fileno(), source.stat().st_size)


@pytest.mark.parametrize("places", [(), (0,), (_MB, 20 * _MB - 4), (9 * _MB - 2,)])
def test_a_copy_is_equal_and_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[int, ...]
) -> None:
    source = _file(tmp_path / "source", 20 * _MB, *places)
    _clone(source, tmp_path / "clone")

    def not_here(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(fcntl, "ioctl", not_here)
    _clone(source, tmp_path / "copy")
    for made in (tmp_path / "clone", tmp_path / "copy"):
        assert made.read_bytes() == source.read_bytes()
        assert made.stat().st_blocks <= source.stat().st_blocks


def test_a_copy_can_be_given_up(tmp_path: Path) -> None:
    source = _file(tmp_path / "source", 4 * _MB, 0, 2 * _MB)
    calls: list[None] = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise Conflict("enough")

    with (
        source.open("rb") as read,
        (tmp_path / "copy").open("wb") as write,
        pytest.raises(Conflict),
    ):
        sparse.copy_data(read.fileno(), write.fileno(), 4 * _MB, check)
    assert (tmp_path / "copy").stat().st_size < 2 * _MB


def test_a_file_that_is_shorter_than_it_was(tmp_path: Path) -> None:
    source = _file(tmp_path / "source", _MB, 0)
    with source.open("rb") as read, (tmp_path / "copy").open("wb") as write:
        sparse.copy_data(read.fileno(), write.fileno(), 4 * _MB)
    assert (tmp_path / "copy").read_bytes()[:4] == b"data"
