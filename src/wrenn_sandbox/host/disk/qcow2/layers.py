"""Chains of disk layers made one: a new layer that shows the guest what all of them show.

No tool does this, since `qemu-img` would have to run on what a captured monitor may have
written. The layers are read within bounds (`reader.Layer`), and every byte of the new layer that
is not the guest's own data is made here.
"""

import array
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.memory.sparse import go_on

from . import overlay
from .reader import (
    CLUSTER,
    COPIED,
    TABLE_ENTRIES,
    ZERO,
    Layer,
    entries_for,
)

_PIECE: Final = 1024 * 1024
_COUNTS: Final = CLUSTER // 2
"""Clusters that one block of 16-bit reference counts is for."""


def put_together(
    chain: Sequence[Path],
    target: Path,
    *,
    below: Disk,
    size: int,
    check: Callable[[], None] = go_on,
) -> None:
    """Write a new layer of `size` bytes that holds all that a chain of layers does.

    The chain goes from the oldest layer to the newest, at least one; the oldest is over what
    `below` names for the new layer. Nobody may write to them meanwhile.
    Blocks; `check` is called now and then and gives up by raising. Raises OSError and
    `IncompatibleImage`; `target` is of no use then.
    """
    with ExitStack() as stack:
        layers = [stack.enter_context(Layer.open(path, size=size)) for path in reversed(chain)]
        made = stack.enter_context(_Target(target, size))
        for index in range(entries_for(size)):
            check()
            merged, sources = _merged(layers, index)
            if merged is not None:
                made.add(index, merged, sources, check)
        made.finish(below)


def _merged(
    layers: Sequence[Layer], index: int
) -> tuple["array.array[int] | None", dict[int, Layer]]:
    """Where the newest clusters of one table are, and in which layer each of them is."""
    merged: array.array[int] | None = None
    sources: dict[int, Layer] = {}
    for layer in layers:
        table = layer.table(index)
        if table is None:
            continue
        if merged is None:
            merged = array.array("Q", bytes(8 * TABLE_ENTRIES))
        for number, entry in enumerate(table):
            if entry and not merged[number]:
                merged[number] = entry
                sources[number] = layer
    return merged, sources


class _Target:
    """A layer being made: data and tables one after the other, what refers to them at the end."""

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self._first = array.array("Q", bytes(8 * entries_for(size)))
        self._end = (1 + overlay.table_clusters(size)) * CLUSTER
        self._fd = overlay.new_file(path)

    def __enter__(self) -> "_Target":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def add(
        self,
        index: int,
        merged: "array.array[int]",
        sources: dict[int, Layer],
        check: Callable[[], None],
    ) -> None:
        """Copy the clusters of one table, in as large pieces as lie together, then the table."""
        table = array.array("Q", bytes(8 * TABLE_ENTRIES))
        run: tuple[Layer, int, int] | None = None
        for number in sorted(sources):
            entry, layer = merged[number], sources[number]
            if entry == ZERO:
                table[number] = ZERO
                continue
            if run is not None and (run[0] is not layer or run[1] + run[2] != entry):
                self._copy(*run, check)
                run = None
            start, length = (entry, 0) if run is None else run[1:]
            table[number] = self._end + length | COPIED
            run = (layer, start, length + CLUSTER)
        if run is not None:
            self._copy(*run, check)
        self._first[index] = self._append(_bytes(table)) | COPIED

    def finish(self, below: Disk) -> None:
        """Write the reference counts, 1 for each cluster, and the header."""
        data = self._end // CLUSTER
        blocks = clusters = 0
        while True:
            total = data + blocks + clusters
            wanted = -(-total // _COUNTS)
            if (blocks, clusters) == (wanted, -(-wanted * 8 // CLUSTER)):
                break
            blocks, clusters = wanted, -(-wanted * 8 // CLUSTER)
        counts = b"\0\1" * total
        first = self._append(counts.ljust(blocks * CLUSTER, b"\0"))
        offsets = array.array("Q", range(first, first + blocks * CLUSTER, CLUSTER))
        table = self._append(_bytes(offsets).ljust(clusters * CLUSTER, b"\0"))
        os.ftruncate(self._fd, self._end)
        _write(self._fd, _bytes(self._first), CLUSTER)
        head = overlay.header(
            below,
            self._size,
            refcounts=table,
            refcount_clusters=clusters,
            table=CLUSTER,
        )
        _write(self._fd, head, 0)

    def _append(self, data: bytes) -> int:
        offset = self._end
        _write(self._fd, data, offset)
        self._end += len(data)
        return offset

    def _copy(self, layer: Layer, start: int, length: int, check: Callable[[], None]) -> None:
        """Append clusters of a layer; what its file lacks of the last stays a hole."""
        end = min(start + length, layer.length)
        target = self._end
        while start < end:
            check()
            moved = _move(layer.fd, self._fd, min(end - start, _PIECE), start, target)
            start, target = start + moved, target + moved
        self._end += length


def _move(source: int, target: int, count: int, start: int, to: int) -> int:
    """Copy some bytes, or share them where the file system can; returns how many."""
    with contextlib.suppress(OSError):
        if moved := os.copy_file_range(source, target, count, start, to):
            return moved
    data = os.pread(source, count, start)
    if not data:
        raise OSError("the disk layer ended early")
    _write(target, data, to)
    return len(data)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _bytes(numbers: "array.array[int]") -> bytes:
    if sys.byteorder == "little":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()
