"""Layers in the format qcow2, as this server makes and QEMU writes them."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.memory.sparse import go_on

from . import layers, overlay, reader


class Qcow2:
    """A `DiskFormat`."""

    def create(self, layer: Path, below: Disk, size: int) -> None:
        overlay.create(layer, backing=below.path, backing_format=_format(below), size=size)

    def require(self, layer: Path, below: Collection[Disk], size: int) -> None:
        reader.require(layer, [(each.path, _format(each)) for each in below], size)

    def merge(
        self,
        chain: Sequence[Path],
        target: Path,
        below: Disk,
        size: int,
        check: Callable[[], None] = go_on,
    ) -> None:
        layers.put_together(
            chain,
            target,
            backing=below.path,
            backing_format=_format(below),
            size=size,
            check=check,
        )


def _format(disk: Disk) -> str:
    return "raw" if disk.raw else "qcow2"
