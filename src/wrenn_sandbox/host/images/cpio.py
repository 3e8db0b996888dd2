"""Writes the archive that the kernel unpacks as its first file system.

Format: cpio "newc" (kernel documentation, `driver-api/early-userspace/buffer-format`). The same
entries give the same bytes: inode numbers follow the order of the entries, times and owners are 0.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 512


@dataclass(frozen=True)
class Entry:
    """One file of the archive; `mode` has the type bits, a link's target is its `data`."""

    path: str
    mode: int
    data: bytes = b""


def directory(path: str, permissions: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | permissions)


def file(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | permissions, data)


def link(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive with its entries sorted by path, so that parents come first.

    Raises ValueError when two entries have the same path or one has no parent.
    """
    ordered = sorted(entries, key=lambda entry: entry.path.split("/"))
    directories = {""}
    seen = set()
    for entry in ordered:
        parent = entry.path.rpartition("/")[0]
        if entry.path in seen or entry.path.startswith("/") or parent not in directories:
            raise ValueError(f"{entry.path}: duplicate, absolute or without a parent directory")
        seen.add(entry.path)
        if stat.S_ISDIR(entry.mode):
            directories.add(entry.path)
    context = [_record(entry, number) for number, entry in enumerate(ordered, start=1)]
    context.append(_record(Entry(_TRAILER, 0), 0))
    return _padded(b"".join(context), _BLOCK)


def _record(entry: Entry, inode: int) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name, 4) + _padded(entry.data, 4)


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)
