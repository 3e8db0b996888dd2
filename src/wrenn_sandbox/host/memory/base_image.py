"""Memory images that machines map privately and can never change.

QEMU before 8.2 opens the file of a private mapping for writing. Giving it the image itself would
let a captured monitor write to it, so it gets a memfd instead: a copy in shared memory, sealed
against writing and resizing, whose pages all machines of the image share. QEMU from 8.2 on opens
read-only and gets the file. An image that has only pages over another one's memory has no such
file: its copy is made of both, for every VMM.
"""

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from . import diff
from .sparse import copy_data

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass
class _Copy:
    """The copy of one image, made by whoever comes first while the others wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    fd: int | None = None
    used_at: float = 0.0
    dropped: bool = False


class SealedMemories:
    """The sealed copies of this server, one for each image, made on first use.

    Calls block, but for `lent`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._copies: dict[Path, _Copy] = {}
        self._guard = threading.Lock()

    def get(self, image: Path, below: Path | None = None) -> int:
        """A descriptor of an image's sealed copy, made first if need be; the caller closes it.

        With `below`, the image is pages over the memory in that file. Raises OSError and
        `IncompatibleImage`.
        """
        while True:
            with self._guard:
                copy = self._copies.setdefault(image, _Copy())
            with copy.lock:
                if copy.dropped:
                    continue
                if copy.fd is None:
                    copy.fd = _sealed_copy(image, below)
                copy.used_at = self._clock()
                return os.dup(copy.fd)

    @asynccontextmanager
    async def lent(self, image: Path, below: Path | None = None) -> AsyncIterator[int]:
        """The same for the time of a block, got in a thread."""
        getting = asyncio.ensure_future(asyncio.to_thread(self.get, image, below))
        try:
            fd = await asyncio.shield(getting)
        except asyncio.CancelledError:
            getting.add_done_callback(_close_unwanted)
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    @staticmethod
    def name(image: Path) -> str:
        """How /proc/PID/maps shows a mapping of the image's copy, also one of another server."""
        return f"/memfd:{_memfd_name(image)} "

    def forget(self, image: Path) -> None:
        """Close the copy of an image that no new machine will use; machines keep theirs."""
        with self._guard:
            copy = self._copies.pop(image, None)
        if copy is None:
            return
        with copy.lock:
            copy.dropped = True
            if copy.fd is not None:
                os.close(copy.fd)

    def trim(self, idle: float, in_use: Collection[Path]) -> None:
        """Close the copies that none of `in_use` is and nobody asked for in `idle` seconds.

        Those of images that are gone go at once.
        """
        before = self._clock() - idle
        with self._guard:
            found = [
                image
                for image, copy in self._copies.items()
                if image not in in_use
                and copy.fd is not None
                and (copy.used_at <= before or not image.exists())
            ]
        for image in found:
            self.forget(image)

    def close(self) -> None:
        """Close all copies."""
        with self._guard:
            images = list(self._copies)
        for image in images:
            self.forget(image)


def _sealed_copy(image: Path, below: Path | None) -> int:
    source = os.open(below or image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(source).st_size
        target = os.memfd_create(_memfd_name(image), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(target, size)
            copy_data(source, target, size)
            if below is not None:
                diff.merge(image.parent, Path(f"/proc/self/fd/{target}"))
            os.fchmod(target, 0o666)
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(target)
            raise
    finally:
        os.close(source)
    return target


def _close_unwanted(getting: "asyncio.Future[int]") -> None:
    if not getting.cancelled() and getting.exception() is None:
        os.close(getting.result())


def _memfd_name(image: Path) -> str:
    return f"wrenn-{image.parent.name}"
