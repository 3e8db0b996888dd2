"""Memory images that machines map privately and can never change.

QEMU before 8.2 opens the file of a private mapping for writing. Giving it the image itself would
let a captured monitor write to it, so it gets a memfd instead: a copy in shared memory, sealed
against writing and resizing, whose pages all machines of the image share. QEMU from 8.2 on opens
read-only and gets the file.
"""

import fcntl
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_PIECE: Final = 8 * 1024 * 1024


@dataclass(frozen=True)
class BaseMemory:
    """An open memory image and its size in bytes."""

    fd: int
    size: int


class SealedMemories:
    """The sealed copies of this server, one for each image, made on first use."""

    def __init__(self) -> None:
        self._open: dict[Path, BaseMemory] = {}
        self._locks: dict[Path, threading.Lock] = {}
        self._guard = threading.Lock()

    def get(self, image: Path) -> BaseMemory:
        """The sealed copy of an image; blocks while it is made. Raises OSError."""
        with self._guard:
            lock = self._locks.setdefault(image, threading.Lock())
        with lock:
            memory = self._open.get(image)
            if memory is None:
                memory = self._open[image] = _sealed_copy(image)
            return memory

    @staticmethod
    def name(image: Path) -> str:
        """How /proc/PID/maps shows a mapping of the image's copy, also one of another server."""
        return f"/memfd:{_memfd_name(image)} "

    def forget(self, image: Path) -> None:
        """Close the copy of an image that no new machine will use; machines keep theirs."""
        with self._guard:
            memory = self._open.pop(image, None)
            self._locks.pop(image, None)
        if memory is not None:
            os.close(memory.fd)

    def close(self) -> None:
        """Close all copies."""
        for image in list(self._open):
            self.forget(image)


def _sealed_copy(image: Path) -> BaseMemory:
    source = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(source).st_size
        target = os.memfd_create(_memfd_name(image), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(target, size)
            _copy_data(source, target, size)
            os.fchmod(target, 0o666)
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(target)
            raise
    finally:
        os.close(source)
    return BaseMemory(target, size)


def _memfd_name(image: Path) -> str:
    return f"wrenn-{image.parent.name}"


def _copy_data(source: int, target: int, size: int) -> None:
    """Copy the parts of a sparse file that hold data."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(source, offset, os.SEEK_HOLE)
        while offset < end:
            data = os.pread(source, min(_PIECE, end - offset), offset)
            if not data:
                raise OSError("memory image ended early")
            os.pwrite(target, data, offset)
            offset += len(data)
