"""What labs leave to each other: hosts that run stay, those of labs that were killed go."""

import fcntl
import os
from pathlib import Path

from lab.host import _sweep


def test_only_hosts_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    held, left = tmp_path / "host-held", tmp_path / "host-left"
    for directory in (held, left):
        directory.mkdir()
        (directory / "disk").touch()
    lock = os.open(held, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [held]
    finally:
        os.close(lock)
    _sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
