"""Layers in the format qcow2, as this server makes and QEMU writes them."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from wrenn_sandbox.host.disk.base import Disk, anything
from wrenn_sandbox.host.memory.sparse import go_on

from . import layers, overlay, reader


class Qcow2:
    """A `DiskFormat`."""

    layered = True

    def create(
        self,
        layer: Path,
        below: Disk,
        size: int,
        check: Callable[[], None] = go_on,
        room: Callable[[int], None] = anything,
    ) -> None:
        overlay.create(layer, below=below, size=size)

    def require(self, layer: Path, below: Collection[Disk], size: int) -> None:
        reader.require(layer, below, size)

    def merge(
        self,
        chain: Sequence[Path],
        target: Path,
        below: Disk,
        size: int,
        check: Callable[[], None] = go_on,
    ) -> None:
        layers.put_together(chain, target, below=below, size=size, check=check)
