"""What each sandbox takes on the host's disk, in allocated bytes.

A sandbox takes its machine's directory, all that is stored of it, and its share of the images that
are there for sandboxes only: private ones, and those that nobody names any more.
"""

import asyncio
import math
import os
import stat
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from wrenn_sandbox.errors import IncompatibleImage, NotFound
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.ids import ImageId, MachineId, SandboxId
from wrenn_sandbox.wire.metrics import StoredBytes

from .context import HostContext
from .paths import Paths

_log = structlog.get_logger(__name__)

_STORED_SEC: Final = 60.0
_WAIT_SEC: Final = 1.0
"""What is stored is measured so often at most, and waited for so long."""

_BLOCK: Final = 512
"""Bytes of what `st_blocks` counts."""


@dataclass(frozen=True)
class Holding:
    """What a sandbox has: perhaps a machine, and the image that its memory is over."""

    sandbox_id: SandboxId
    machine_id: MachineId | None
    image_id: ImageId | None


async def measured(context: HostContext, holdings: Sequence[Holding]) -> dict[SandboxId, int]:
    """Bytes of each sandbox; nothing where that cannot be told just now."""
    variants, engine = context.settings.max_variants, context.driver.capabilities.engine or None
    try:
        return await asyncio.to_thread(
            measure, context.paths, context.store, holdings, variants, engine
        )
    except (OSError, IncompatibleImage) as error:
        _log.warning("disk use not measured", detail=str(error))
        return {}


def measure(
    paths: Paths,
    store: ImageStore,
    holdings: Sequence[Holding],
    variants: int,
    engine: str | None = None,
) -> dict[SandboxId, int]:
    """Bytes of each sandbox; a file that goes meanwhile counts nothing. Blocks."""
    kept = store.kept(variants, engine)
    needed = {each.sandbox_id: _own_images(store, each, kept) for each in holdings}
    users = Counter(image for images in needed.values() for image in images)
    sizes = {image: allocated(paths.image(image)) // count for image, count in users.items()}
    return {
        each.sandbox_id: allocated(paths.stored(each.sandbox_id))
        + (0 if each.machine_id is None else allocated(paths.machine(each.machine_id).directory))
        + sum(sizes[image] for image in needed[each.sandbox_id])
        for each in holdings
    }


class Stored:
    """What is allocated in a data directory, measured when it is asked for, once in a while."""

    def __init__(self, paths: Paths, store: ImageStore) -> None:
        self._paths = paths
        self._store = store
        self._measuring: asyncio.Task[None] | None = None
        self._at = -math.inf
        self._found: StoredBytes | None = None

    async def now(self) -> StoredBytes | None:
        """As it was a minute ago, or longer where measuring takes long; None until it is known."""
        if self._measuring is None and time.monotonic() - self._at >= _STORED_SEC:
            self._measuring = asyncio.create_task(self._measure_again(), name="stored bytes")
        if self._measuring is not None:
            await asyncio.wait([self._measuring], timeout=_WAIT_SEC)
        return self._found

    async def close(self) -> None:
        """Wait for what is being measured."""
        if self._measuring is not None:
            await asyncio.wait([self._measuring])

    async def _measure_again(self) -> None:
        try:
            self._found = await asyncio.to_thread(self._measure)
        except OSError as error:
            _log.warning("disk use not measured", detail=str(error))
        finally:
            self._at, self._measuring = time.monotonic(), None

    def _measure(self) -> StoredBytes:
        paths, held = self._paths, self._store.held()
        images: Counter[str] = Counter()
        for directory in paths.images.iterdir():
            images[self._purpose(ImageId(directory.name), held)] += allocated(directory)
        return StoredBytes(
            images=images["images"],
            snapshots=images["snapshots"],
            paused=images["paused"] + allocated(paths.paused),
            running=allocated(paths.run),
            engines=allocated(paths.engines),
        )

    def _purpose(self, image_id: ImageId, held: set[ImageId]) -> str:
        if image_id in held:
            return "snapshots"
        try:
            return "paused" if self._store.open(image_id).private else "images"
        except (NotFound, IncompatibleImage):
            return "images"


def _own_images(store: ImageStore, holding: Holding, kept: set[ImageId]) -> set[ImageId]:
    if holding.image_id is None:
        return set()
    try:
        return store.with_bases({holding.image_id}) - kept
    except (NotFound, IncompatibleImage):
        return set()


def allocated(directory: Path) -> int:
    """Bytes that the files below a directory take; 0 where there is none."""
    total = 0
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    total += allocated(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * _BLOCK
    return total


def held_open(pid: int, beside: Path) -> int:
    """Bytes of the files that have no name any more and go when a process ends; blocks.

    Those count that are on the file system of `beside`. Raises OSError where the process is gone.
    """
    device, found = beside.stat().st_dev, dict[int, int]()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            facts = os.stat(f"/proc/{pid}/fd/{name}")
            if stat.S_ISREG(facts.st_mode) and facts.st_dev == device and not facts.st_nlink:
                found[facts.st_ino] = facts.st_blocks * _BLOCK
    return sum(found.values())


_MB: Final = 1 << 20
_TABLES: Final = 32
"""A full layer takes up to one part in so many more than the disk, for its tables."""


@dataclass(frozen=True)
class Layers:
    """Allocated bytes of the layers of a disk of `disk_mb`, in bytes but for that.

    `older` are those that a later one builds on; `newest` is a stored sandbox's own, 0 for one
    that runs.
    """

    disk_mb: int
    older: int
    newest: int
    count: int
    """How many older ones there are."""

    @classmethod
    def of(cls, disk_mb: int, older: Sequence[Path], newest: Sequence[Path]) -> "Layers":
        """Measures; blocks. Raises OSError."""
        bytes_older, bytes_newest = (
            _BLOCK * sum(each.stat().st_blocks for each in layers) for layers in (older, newest)
        )
        return cls(disk_mb, bytes_older, bytes_newest, len(older))

    def may_start(self, factor: int) -> bool:
        """Whether one more layer, however full, stays within the bound."""
        return self.older + self.newest <= (factor - 1) * self._full

    def is_outgrown(self, factor: int) -> bool:
        """Whether the older ones are to be put together now."""
        if self.count < 2:
            return False
        return not self.may_start(factor) or self.older > (factor - 1.5) * self._full

    @property
    def _full(self) -> int:
        return self.disk_mb * _MB + self.disk_mb * _MB // _TABLES
