"""Finding, reading and writing the pages of another process's private file mapping.

A page of such a mapping that is present or swapped and whose pagemap bit 61 is clear is the
process's own copy; every other page is still the file's. (Bits: the kernel's
Documentation/admin-guide/mm/pagemap.rst.) The decision never looks at content, so a page that
was zeroed counts as changed.
"""

import array
import ctypes
import heapq
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

PAGE: Final = mmap.PAGESIZE
_ENTRY: Final = 8
_IOV_MAX: Final = 1024
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20
_OWN: Final = bytes(
    1 if flags & (_PRESENT | _SWAPPED) and not flags & _OF_FILE else 0 for flags in range(256)
)

_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


class Run(msgspec.Struct, frozen=True, gc=False):
    """Consecutive pages: the number of the first in guest memory, and how many."""

    first: int
    count: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.count * PAGE


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a file is mapped in a process: addresses of the first byte and behind the last."""

    pid: int
    low: int
    high: int
    first: int = 0
    """The page of guest memory at its beginning."""

    @property
    def end(self) -> int:
        """The page of guest memory behind its end."""
        return self.first + (self.high - self.low) // PAGE

    def address(self, page: int) -> int:
        """Where a page of guest memory is."""
        return self.low + (page - self.first) * PAGE


def find_mapping(pid: int, name: str, size: int) -> Mapping:
    """The mapping of `size` bytes whose path contains `name`; raises LookupError.

    The kernel may list one mapping in pieces, which are put together again.
    """
    low = high = 0
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            if name not in line:
                continue
            first, _, last = line.split(" ", 1)[0].partition("-")
            if high and int(first, 16) == high:
                high = int(last, 16)
            else:
                low, high = int(first, 16), int(last, 16)
            if high - low == size:
                return Mapping(pid, low, high)
    raise LookupError(f"process {pid} has no mapping of {size} bytes of {name}")


def find_pieces(pid: int, name: str, size: int) -> list[Mapping]:
    """The mappings that a file of `size` bytes whose path contains `name` is mapped by as a whole.

    They are in the order of the file. Raises LookupError.
    """
    found: list[Mapping] = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            if name in line:
                addresses, _, offset, *_ = line.split(" ", 3)
                low, high = (int(each, 16) for each in addresses.split("-"))
                found.append(Mapping(pid, low, high, int(offset, 16) // PAGE))
    found.sort(key=lambda each: each.first)
    end = 0
    for each in found:
        if each.first != end:
            raise LookupError(f"process {pid} has not mapped page {end} of {name}")
        end += (each.high - each.low) // PAGE
    if end * PAGE != size:
        raise LookupError(f"process {pid} has not mapped {size} bytes of {name}")
    return found


def union(runs: Sequence[Run], others: Sequence[Run]) -> list[Run]:
    """The pages of both, in order; each of them is in order."""
    found: list[Run] = []
    for run in heapq.merge(runs, others, key=lambda each: each.first):
        if found and run.first <= found[-1].first + found[-1].count:
            last = found.pop()
            end = max(last.first + last.count, run.first + run.count)
            run = Run(last.first, end - last.first)
        found.append(run)
    return found


def without(runs: Sequence[Run], others: Sequence[Run]) -> list[Run]:
    """The pages of the runs that are in none of the others, in order; so are they all."""
    found: list[Run] = []
    at = 0
    for run in runs:
        first, end = run.first, run.first + run.count
        while at < len(others) and others[at].first + others[at].count <= first:
            at += 1
        number = at
        while first < end:
            other = others[number] if number < len(others) else Run(end, 0)
            stop = min(max(other.first, first), end)
            if first < stop:
                found.append(Run(first, stop - first))
            first = max(first, other.first + other.count) if other.count else end
            number += 1
    return found


def within(runs: Sequence[Run], first: int, end: int) -> list[Run]:
    """What of these runs is from page `first` up to page `end`."""
    found = []
    for run in runs:
        low, high = max(run.first, first), min(run.first + run.count, end)
        if low < high:
            found.append(Run(low, high - low))
    return found


def own_pages(mapping: Mapping) -> list[Run]:
    """The pages that are the process's own, in order. The process must be stopped or idle.

    A run may end where the next one begins.
    """
    pages = (mapping.high - mapping.low) // PAGE
    runs: list[Run] = []
    fd = os.open(f"/proc/{mapping.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        step = 1 << 18
        for start in range(0, pages, step):
            count = min(step, pages - start)
            entries = os.pread(fd, count * _ENTRY, (mapping.low // PAGE + start) * _ENTRY)
            if len(entries) != count * _ENTRY:
                raise OSError(f"pagemap of process {mapping.pid} ended early")
            own = entries[_ENTRY - 1 :: _ENTRY].translate(_OWN)
            end = 0
            while (first := own.find(1, end)) >= 0:
                end = own.find(0, first)
                if end < 0:
                    end = count
                runs.append(Run(mapping.first + start + first, end - first))
    finally:
        os.close(fd)
    return runs


def split(runs: Sequence[Run], pages: int) -> list[list[Run]]:
    """The runs in order, in batches of at most `pages` pages and a system call's worth of runs."""
    batches: list[list[Run]] = []
    batch: list[Run] = []
    room = pages
    for run in runs:
        left = run
        while left.count > room or len(batch) == _IOV_MAX:
            if room and len(batch) < _IOV_MAX:
                batch.append(Run(left.first, room))
                left = Run(left.first + room, left.count - room)
            batches.append(batch)
            batch, room = [], pages
        batch.append(left)
        room -= left.count
    if batch:
        batches.append(batch)
    return batches


def read(mapping: Mapping, runs: Sequence[Run], into: memoryview) -> None:
    """Copy the runs (at most 1024) out of the process into a writable buffer of their size."""
    _transfer(_libc.process_vm_readv, "read", mapping, runs, into)


def write(mapping: Mapping, runs: Sequence[Run], data: memoryview) -> None:
    """Copy a writable buffer into the process's pages (at most 1024 runs)."""
    _transfer(_libc.process_vm_writev, "write", mapping, runs, data)


def _transfer(
    call: "ctypes._NamedFuncPointer",
    what: str,
    mapping: Mapping,
    runs: Sequence[Run],
    buffer: memoryview,
) -> None:
    size = sum(run.size for run in runs)
    if not runs:
        return
    local = (_IoVec * 1)(_IoVec(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), size))
    numbers = [n for run in runs for n in (mapping.address(run.first), run.count * PAGE)]
    remote = (_IoVec * len(runs)).from_buffer(array.array("L", numbers))
    moved = call(mapping.pid, local, 1, remote, len(runs), 0)
    if moved != size:
        code = ctypes.get_errno() if moved < 0 else 0
        raise OSError(code, f"{what} of guest memory moved {moved} of {size} bytes")
