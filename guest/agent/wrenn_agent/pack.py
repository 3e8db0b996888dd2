"""A tree as a tar archive, in pieces."""

from __future__ import annotations

import os
import stat
import tarfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

PIECE = 1024 * 1024
LEFT_OUT = "WRENN.left_out"
REASON = "WRENN.reason"
"""Keywords of a global header: what of the archive's paths is missing, or not to be kept where it
came just before, and why."""
_BLOCK = 512
_SEGMENTS = 100_000
"""Pieces of a sparse file; one with more is sent with its holes."""
_MODE = 0o1777
"""No set-user-id and set-group-id bits: the copy belongs to somebody else."""
_END = bytes(2 * _BLOCK)

_KERNEL = ("proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "tracefs", "debugfs", "securityfs")
"""File systems that hold what the kernel says, and no files; one of them is read when asked for."""


class _Found:
    __slots__ = ("name", "path", "status")

    def __init__(self, path: str, name: str, status: os.stat_result) -> None:
        self.path = path
        self.name = name
        self.status = status


def pack(path: str, follow: bool) -> Iterator[bytes]:
    """The archive of `path` and all that is below it; with `follow` of what it leads to.

    Names begin with its last one, or with `.` when it has none. What cannot be read is left out,
    and a header in its place says so.
    """
    name = os.path.basename(path.rstrip("/"))
    links: dict[tuple[int, int], str] = {}
    top: _Found | None = None
    last = b""
    for found in _walk(path, "." if name in ("", "..") else name, follow):
        if isinstance(found, bytes):
            last = found
            yield last
            continue
        top = top or found
        for last in _entry(found, links):
            yield last
    if top is not None and stat.S_ISDIR(top.status.st_mode) and last[156:157] == b"g":
        # readers want an entry after each global header
        yield from _entry(top, links)
    yield _END


def _walk(path: str, name: str, follow: bool) -> Iterator[_Found | bytes]:
    """Each directory before what is in it, and notes of what is left out."""
    waiting = [(path, name)]
    top, skipped, kernel = os.path.realpath(path), len(name), _kernel_mounts()
    first = True
    while waiting:
        path, name = waiting.pop()
        try:
            status = os.stat(path) if follow and first else os.lstat(path)
            yield _Found(path, name, status)
            if stat.S_ISDIR(status.st_mode):
                if not first and top.rstrip("/") + name[skipped:] in kernel:
                    yield _note(name, "it is the kernel's")
                else:
                    inside = sorted(os.listdir(path), reverse=True)
                    waiting += [(os.path.join(path, each), f"{name}/{each}") for each in inside]
        except OSError as error:
            yield _note(name, _reason(error))
        first = False


def _kernel_mounts() -> set[str]:
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            mounts = [line.split(" ") for line in file]
    except OSError:
        return set()
    return {mount[1] for mount in mounts if len(mount) > 2 and mount[2] in _KERNEL}


def _entry(found: _Found, links: dict[tuple[int, int], str]) -> Iterator[bytes]:
    header, status = _header(found), found.status
    if stat.S_ISDIR(status.st_mode):
        header.type = tarfile.DIRTYPE
        yield _bytes(header)
    elif stat.S_ISLNK(status.st_mode):
        try:
            header.linkname = os.readlink(found.path)
        except OSError as error:
            yield _note(found.name, _reason(error))
            return
        header.type = tarfile.SYMTYPE
        yield _bytes(header)
    elif stat.S_ISREG(status.st_mode):
        same = (status.st_dev, status.st_ino)
        if same in links:
            header.type, header.linkname = tarfile.LNKTYPE, links[same]
            yield _bytes(header)
            return
        try:
            file = os.open(found.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            yield _note(found.name, _reason(error))
            return
        try:
            why = yield from _content(file, header)
        finally:
            os.close(file)
        if why is None and status.st_nlink > 1:
            links[same] = found.name
        elif why is not None:
            yield _note(found.name, why)
    else:
        yield _note(found.name, "it is a device, a pipe or a socket")


def _content(file: int, header: tarfile.TarInfo) -> Generator[bytes, None, str | None]:
    """Header and content of a file; returns why it is not to be kept, where it is not."""
    try:
        whole = _whole(file)
        if whole is not None:
            header.size = len(whole)
            yield _bytes(header)
            yield whole + bytes(-len(whole) % _BLOCK)
            return None
        size = os.fstat(file).st_size
        if size < PIECE:  # less than what was read
            yield _bytes(header)
            return "its size is not known"
        segments = _segments(file, size)
    except OSError as error:
        yield _bytes(header)
        return _reason(error)
    if segments is None:
        header.size = size
        yield _bytes(header)
        return (yield from _data(file, [(0, size)], size))
    sparse_map = "".join(
        f"{number}\n" for number in (len(segments), *(each for pair in segments for each in pair))
    ).encode()
    sparse_map += bytes(-len(sparse_map) % _BLOCK)
    stored = sum(length for _, length in segments)
    header.size = len(sparse_map) + stored
    header.pax_headers = {
        **header.pax_headers,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": header.name,
        "GNU.sparse.realsize": str(size),
    }
    yield _bytes(header)
    yield sparse_map
    return (yield from _data(file, segments, stored))


def _whole(file: int) -> bytes | None:
    """What is in a small file, whatever its size was said to be; None for others."""
    data = b""
    while len(data) < PIECE:
        piece = os.pread(file, PIECE - len(data), len(data))
        if not piece:
            return data
        data += piece
    return None


def _segments(file: int, size: int) -> list[tuple[int, int]] | None:
    """Offset and length of what is in a sparse file; None for one that is not."""
    if not hasattr(os, "SEEK_DATA"):
        return None
    found: list[tuple[int, int]] = []
    at = 0
    while at < size and len(found) < _SEGMENTS:
        try:
            begin = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            break
        at = min(os.lseek(file, begin, os.SEEK_HOLE), size)
        if begin < size:
            found.append((begin, at - begin))
    if found == [(0, size)] or len(found) == _SEGMENTS:
        return None
    return [*found, (size, 0)]


def _data(
    file: int, segments: list[tuple[int, int]], stored: int
) -> Generator[bytes, None, str | None]:
    """So many bytes as were announced, whatever becomes of the file."""
    why = None
    for offset, length in segments:
        while length > 0:
            piece = b""
            if why is None:
                try:
                    piece = os.pread(file, min(PIECE, length), offset)
                    if not piece:
                        why = "it became shorter while it was read"
                except OSError as error:
                    why = _reason(error)
            piece = piece or bytes(min(PIECE, length))
            yield piece
            offset += len(piece)
            length -= len(piece)
    yield bytes(-stored % _BLOCK)
    return why


def _header(found: _Found) -> tarfile.TarInfo:
    header = tarfile.TarInfo(found.name)
    header.mode = found.status.st_mode & _MODE
    seconds, rest = divmod(found.status.st_mtime_ns, 10**9)
    header.mtime = max(0, seconds)
    if seconds >= 0:
        header.pax_headers = {"mtime": f"{seconds}.{rest:09}"}
    return header


def _note(name: str, why: str) -> bytes:
    """A header that says that a path was left out."""
    return tarfile.TarInfo.create_pax_global_header({LEFT_OUT: name, REASON: why})


def _bytes(header: tarfile.TarInfo) -> bytes:
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
