"""Reading qcow2 layers that a monitor may have written: nothing in them is taken on trust.

A layer's header may name any file of the host as its backing image, as its data or as its key.
So no tool gets to open a layer before `require` has found it to be of the one form that this
server makes, over the one file that it is over, and `Layer` reads tables within bounds. Format:
QEMU's docs/interop/qcow2.txt.
"""

import array
import os
import stat
import struct
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.disk.base import Disk

CLUSTER_BITS: Final = 16
CLUSTER: Final = 1 << CLUSTER_BITS
TABLE_ENTRIES: Final = CLUSTER // 8
TABLE_COVERS: Final = TABLE_ENTRIES * CLUSTER
"""Bytes of disk that one entry of the first-level table stands for."""

MAGIC: Final = b"QFI\xfb"
VERSION: Final = 3
REFCOUNT_ORDER: Final = 4
HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""The first 104 bytes: all fields of version 3 but those that came later."""
BACKING_FORMAT: Final = 0xE2792ACA
END_OF_EXTENSIONS: Final = 0
EXTENSION: Final = struct.Struct(">II")
COPIED: Final = 1 << 63
"""Flag of a table's entry: the cluster is referred to once, so it may be written in place."""
ZERO: Final = 1
"""Flag of a second-level entry: reads as zeros, whatever is below."""

_FEATURE_NAMES: Final = 0x6803F857
_LONGEST_HEADER: Final = 4096
_DEEPEST: Final = 1000
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_DAMAGED: Final = "The sandbox's disk is damaged"


@dataclass(frozen=True)
class Header:
    """What a layer says of itself; offsets and sizes in bytes, the table's size in entries."""

    size: int
    backing: bytes
    backing_format: bytes
    table_offset: int
    table_entries: int


def entries_for(size: int) -> int:
    """How many first-level entries a disk of `size` bytes has."""
    return -(-size // TABLE_COVERS)


def parse(head: bytes) -> Header:
    """The header of a layer as this server and QEMU write them, given its first cluster.

    Raises `IncompatibleImage` for whatever else qcow2 allows: other versions and cluster sizes,
    encryption, internal snapshots, bitmaps, external data, compression.
    """
    if len(head) < HEADER.size:
        raise _damaged("no header")
    (
        magic,
        version,
        backing_offset,
        backing_length,
        cluster_bits,
        size,
        encryption,
        table_entries,
        table_offset,
        _refcounts,
        _refcount_clusters,
        snapshots,
        _snapshots_offset,
        incompatible,
        compatible,
        autoclear,
        refcount_order,
        length,
    ) = HEADER.unpack_from(head)
    if magic != MAGIC or version != VERSION:
        raise _damaged(f"magic {magic!r} version {version}")
    if (cluster_bits, refcount_order) != (CLUSTER_BITS, REFCOUNT_ORDER):
        raise _damaged(f"clusters of {cluster_bits} bits, reference counts of {refcount_order}")
    if encryption or snapshots or incompatible or compatible or autoclear:
        raise _damaged(
            f"encryption {encryption} snapshots {snapshots}"
            f" features {incompatible:#x} {compatible:#x} {autoclear:#x}"
        )
    if not HEADER.size <= length <= _LONGEST_HEADER or any(head[HEADER.size : length]):
        raise _damaged(f"header of {length} bytes")
    if not 0 < backing_length < 1024 or not length < backing_offset <= CLUSTER - backing_length:
        raise _damaged(f"backing name at {backing_offset}, {backing_length} bytes")
    return Header(
        size=size,
        backing=head[backing_offset : backing_offset + backing_length],
        backing_format=_backing_format(head, length, backing_offset),
        table_offset=table_offset,
        table_entries=table_entries,
    )


def format_of(disk: Disk) -> bytes:
    """The name of a disk's format in the header of a layer over it."""
    return b"raw" if disk.raw else b"qcow2"


def require(path: Path, below: Collection[Disk], size: int) -> None:
    """Raise `IncompatibleImage` unless a layer of `size` bytes is over one of these; OSError.

    Blocks. Nobody may write to the layer between this and its use.
    """
    with Layer.open(path, size=size) as layer:
        found = (layer.header.backing, layer.header.backing_format)
    if found not in [(os.fsencode(each.path), format_of(each)) for each in below]:
        raise _damaged(f"it is over {found!r}"[:500])


def depth(path: Path) -> int:
    """How many files are below a layer that `require` has passed. Blocks.

    Raises OSError, and `IncompatibleImage` for what is no layer.
    """
    for count in range(1, _DEEPEST + 1):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            header = parse(os.pread(fd, CLUSTER, 0))
        finally:
            os.close(fd)
        if header.backing_format == b"raw":
            return count
        path = path.parent / os.fsdecode(header.backing)
    raise _damaged(f"more than {_DEEPEST} layers")


class Layer:
    """An open layer; its tables are read when asked for. Use as a context."""

    def __init__(self, fd: int, length: int, header: Header) -> None:
        self.fd = fd
        self.length = length
        """Bytes of the file; the rest of its last cluster may be missing and reads as zeros."""
        self.header = header
        offset = self._in_bounds(header.table_offset)
        raw = self._read(offset, header.table_entries * 8)
        self._tables = _numbers(raw)

    @classmethod
    def open(cls, path: Path, *, size: int) -> Self:
        """Open a layer of a disk of `size` bytes; raises `IncompatibleImage` and OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise _damaged("not a file")
            header = parse(os.pread(fd, CLUSTER, 0))
            if header.size != size or header.table_entries != entries_for(size):
                raise _damaged(f"{header.size} bytes instead of {size}")
            return cls(fd, facts.st_size, header)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def table(self, index: int) -> "array.array[int] | None":
        """Where the clusters of one second-level table are: 0 where this layer has nothing,
        `ZERO` where it has zeros, else an offset. None for a table without any."""
        entry = self._tables[index]
        if entry & ~(_OFFSET | COPIED):
            raise _damaged(f"first-level entry {entry:#x}")
        if not entry & _OFFSET:
            return None
        found = _numbers(self._read(self._in_bounds(entry & _OFFSET), CLUSTER))
        for number, entry in enumerate(found):
            if entry:
                found[number] = self._cluster(entry)
        return found

    def _cluster(self, entry: int) -> int:
        if entry & ~(_OFFSET | COPIED | ZERO):
            raise _damaged(f"second-level entry {entry:#x}")
        if entry & ZERO:
            return ZERO
        return self._in_bounds(entry & _OFFSET)

    def _in_bounds(self, offset: int) -> int:
        if offset % CLUSTER or not 0 < offset < self.length:
            raise _damaged(f"cluster at {offset} of {self.length}")
        return offset

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        return data.ljust(size, b"\0")


def _backing_format(head: bytes, start: int, end: int) -> bytes:
    found = b""
    while start + EXTENSION.size <= end:
        kind, length = EXTENSION.unpack_from(head, start)
        start += EXTENSION.size
        if kind == END_OF_EXTENSIONS:
            return found
        if length > end - start or kind not in (BACKING_FORMAT, _FEATURE_NAMES):
            raise _damaged(f"header extension {kind:#x} of {length} bytes")
        if kind == BACKING_FORMAT:
            if found:
                raise _damaged("two backing formats")
            found = head[start : start + length]
        start += -(-length // 8) * 8
    raise _damaged("header extensions without end")


def _numbers(data: bytes) -> "array.array[int]":
    numbers = array.array("Q", data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _damaged(detail: str) -> IncompatibleImage:
    return IncompatibleImage(_DAMAGED, detail=f"disk layer: {detail}")
