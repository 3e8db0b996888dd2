"""Disks without layers: each file holds all that the guest sees.

A new one is a copy of the one below. It shares its blocks where the file system can (Btrfs, XFS);
elsewhere the data is copied, holes not.
"""

import os
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.memory import sparse
from wrenn_sandbox.host.memory.sparse import go_on

from .base import Disk, anything

_BLOCK: Final = 512
"""Bytes of what `st_blocks` counts."""


class Raw:
    """A `DiskFormat`."""

    layered = False

    def create(
        self,
        layer: Path,
        below: Disk,
        size: int,
        check: Callable[[], None] = go_on,
        room: Callable[[int], None] = anything,
    ) -> None:
        _copy(layer.parent / below.path, layer, size, check, room)

    def require(self, layer: Path, below: Collection[Disk], size: int) -> None:
        facts = layer.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
            detail = f"raw disk: mode {facts.st_mode:o}, {facts.st_size} bytes instead of {size}"
            raise IncompatibleImage("The sandbox's disk is damaged", detail=detail)

    def merge(
        self,
        chain: Sequence[Path],
        target: Path,
        below: Disk,
        size: int,
        check: Callable[[], None] = go_on,
    ) -> None:
        self.require(chain[-1], (), size)
        _copy(chain[-1], target, size, check)


def _copy(
    source: Path,
    target: Path,
    size: int,
    check: Callable[[], None] = go_on,
    room: Callable[[int], None] = anything,
) -> None:
    """What a guest has written to a disk is data here: nothing looks at it."""
    read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(read, "rb", buffering=0):
        found = os.fstat(read).st_size
        if found != size:
            raise OSError(f"the disk below has {found} bytes instead of {size}")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        with open(os.open(target, flags, 0o600), "wb", buffering=0) as write:
            if sparse.shared(read, write.fileno()):
                return
            room(os.fstat(read).st_blocks * _BLOCK)
            os.ftruncate(write.fileno(), size)
            sparse.copy_data(read, write.fileno(), size, check)
