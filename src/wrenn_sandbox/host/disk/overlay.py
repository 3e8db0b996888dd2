"""Writable disk layers: empty qcow2 images over a backing image.

Written here rather than by `qemu-img create`, which costs a process (20 ms) per sandbox. Format:
QEMU's docs/interop/qcow2.txt, version 3, clusters of 64 KiB, 16-bit reference counts.
"""

import os
import struct
from pathlib import Path
from typing import Final

_CLUSTER_BITS: Final = 16
_CLUSTER: Final = 1 << _CLUSTER_BITS
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_HEADER_LENGTH: Final = 104
_BACKING_FORMAT: Final = 0xE2792ACA
_L1_COVERS: Final = _CLUSTER // 8 * _CLUSTER
"""Bytes of disk that one entry of the first-level table stands for."""

OWNER_ONLY: Final = 0o600


def create(path: Path, *, backing: Path, backing_format: str, size: int) -> None:
    """Write an empty layer of `size` bytes over `backing` ("raw" or "qcow2"); raises OSError."""
    entries = -(-size // _L1_COVERS)
    table_clusters = -(-entries * 8 // _CLUSTER)
    name = os.fsencode(backing)
    extension = backing_format.encode("ascii")
    head = bytearray(
        _HEADER.pack(
            b"QFI\xfb",
            3,
            _HEADER_LENGTH + 8 + 8 + 8,
            len(name),
            _CLUSTER_BITS,
            size,
            0,
            entries,
            3 * _CLUSTER,
            _CLUSTER,
            1,
            0,
            0,
            0,
            0,
            0,
            4,
            _HEADER_LENGTH,
        )
    )
    head += struct.pack(">II8s", _BACKING_FORMAT, len(extension), extension)
    head += struct.pack(">II", 0, 0)
    head += name
    if len(head) > _CLUSTER or len(name) > 1023 or len(extension) > 8:
        raise OSError("the path of the backing image is too long")
    clusters = 3 + table_clusters
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, OWNER_ONLY)
    try:
        os.ftruncate(fd, clusters * _CLUSTER)
        os.pwrite(fd, head, 0)
        os.pwrite(fd, struct.pack(">Q", 2 * _CLUSTER), _CLUSTER)
        os.pwrite(fd, struct.pack(f">{clusters}H", *[1] * clusters), 2 * _CLUSTER)
    finally:
        os.close(fd)


def set_backing(path: Path, backing: str) -> None:
    """Name another path for the same backing image; raises OSError.

    A relative path is taken from the layer's own directory.
    """
    name = os.fsencode(backing)
    with path.open("r+b") as file:
        head = file.read(_HEADER_LENGTH)
        offset, length = struct.unpack_from(">QI", head, 8)
        if head[:4] != b"QFI\xfb" or not offset or offset + len(name) > _CLUSTER:
            raise OSError("the disk layer has no place for the path of its backing image")
        file.seek(offset)
        file.write(name.ljust(length, b"\0") if len(name) < length else name)
        file.seek(16)
        file.write(struct.pack(">I", len(name)))
