"""Writable disk layers: empty qcow2 images over a backing image.

Written here rather than by `qemu-img create`, which costs a process (20 ms) per sandbox. Format:
QEMU's docs/interop/qcow2.txt, version 3, clusters of 64 KiB, 16-bit reference counts.
"""

import os
import struct
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.disk.base import Disk

from .reader import (
    BACKING_FORMAT,
    CLUSTER,
    CLUSTER_BITS,
    END_OF_EXTENSIONS,
    EXTENSION,
    HEADER,
    MAGIC,
    REFCOUNT_ORDER,
    VERSION,
    entries_for,
    format_of,
)

OWNER_ONLY: Final = 0o600


def create(path: Path, *, below: Disk, size: int) -> None:
    """Write an empty layer of `size` bytes over `below`; raises OSError."""
    head = header(below, size, refcounts=CLUSTER, refcount_clusters=1, table=3 * CLUSTER)
    clusters = 3 + table_clusters(size)
    fd = new_file(path)
    try:
        os.ftruncate(fd, clusters * CLUSTER)
        os.pwrite(fd, head, 0)
        os.pwrite(fd, struct.pack(">Q", 2 * CLUSTER), CLUSTER)
        os.pwrite(fd, struct.pack(f">{clusters}H", *[1] * clusters), 2 * CLUSTER)
    finally:
        os.close(fd)


def new_file(path: Path) -> int:
    """A descriptor of a new file for a layer; raises OSError where there is one."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, OWNER_ONLY)


def table_clusters(size: int) -> int:
    """How many clusters the first-level table of a disk of `size` bytes takes."""
    return -(-entries_for(size) * 8 // CLUSTER)


def header(below: Disk, size: int, *, refcounts: int, refcount_clusters: int, table: int) -> bytes:
    """The first cluster of a layer, as far as it is not zero; raises OSError.

    `refcounts` and `table` are the offsets of the reference counts' and the first-level table.
    """
    backing, extension = os.fsencode(below.path), format_of(below)
    extensions = EXTENSION.pack(BACKING_FORMAT, len(extension)) + extension.ljust(8, b"\0")
    extensions += EXTENSION.pack(END_OF_EXTENSIONS, 0)
    if len(backing) > 1023:
        raise OSError("the path of the backing image is too long")
    fields = HEADER.pack(
        MAGIC,
        VERSION,
        HEADER.size + len(extensions),
        len(backing),
        CLUSTER_BITS,
        size,
        0,
        entries_for(size),
        table,
        refcounts,
        refcount_clusters,
        0,
        0,
        0,
        0,
        0,
        REFCOUNT_ORDER,
        HEADER.size,
    )
    return fields + extensions + backing
