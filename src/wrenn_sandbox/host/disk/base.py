"""What a driver says of its disks: how a VM's own writes are kept over disks that do not change."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wrenn_sandbox.host.memory.sparse import go_on


@dataclass(frozen=True)
class Disk:
    """A disk that a layer is over and that nobody writes to any more."""

    path: Path
    """A relative one is taken from the directory of the layer."""
    raw: bool
    """It holds the bytes that the guest sees; otherwise it is a layer itself."""


def anything(_: int) -> None:
    """The question for room where there is always enough."""


class DiskFormat(Protocol):
    """The format of a VM's writable disk layer. Sizes are bytes. All calls block."""

    layered: bool
    """A layer needs those below; otherwise each holds the whole disk."""

    def create(
        self,
        layer: Path,
        below: Disk,
        size: int,
        check: Callable[[], None] = go_on,
        room: Callable[[int], None] = anything,
    ) -> None:
        """Write an empty layer, which its owner alone may read; raises OSError.

        Where that means a copy of what is below, `room` is called first with the bytes that it
        takes, and `check` now and then: they give up by raising.
        """
        ...

    def require(self, layer: Path, below: Collection[Disk], size: int) -> None:
        """Raise `IncompatibleImage` unless a layer is whole and over one of `below`; OSError.

        A VMM that its guest has captured may have written anything to the layer.
        """
        ...

    def merge(
        self,
        chain: Sequence[Path],
        target: Path,
        below: Disk,
        size: int,
        check: Callable[[], None] = go_on,
    ) -> None:
        """Write a new layer over `below` that holds all that a chain of layers does.

        The chain goes from the oldest layer to the newest; nobody writes to them meanwhile.
        `check` is called now and then and gives up by raising. Raises OSError and
        `IncompatibleImage`; `target` is of no use then.
        """
        ...
