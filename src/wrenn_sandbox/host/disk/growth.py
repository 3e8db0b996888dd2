"""How much the layers of one disk may take together.

A layer takes no more than the guest's disk has, but every pause adds one, and a guest that writes
its disk anew in each of its lives fills them all. `factor` bounds the sum: what lies below the
newest layer is put together in good time, and a machine that would pass the bound with one more
full layer does not start before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
        return cls(
            disk_mb,
            sum(map(_allocated, older)),
            sum(map(_allocated, newest)),
            len(older),
        )

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


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512
