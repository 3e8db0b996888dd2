"""Disks that layers build on."""

from pathlib import Path

import pytest

_MB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A raw disk of 4 MiB whose second half is full of 0x77."""
    path = tmp_path / "cold" / "disk"
    path.parent.mkdir()
    path.write_bytes(bytes(2 * _MB) + b"\x77" * 2 * _MB)
    return path
