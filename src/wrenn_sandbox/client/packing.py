"""Trees of this machine as a tar archive, in pieces."""

import os
import stat
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

PIECE: Final = 1024 * 1024
LEFT_OUT: Final = "WRENN.left_out"
REASON: Final = "WRENN.reason"
"""Keywords of a global header: what of the archive's paths is missing, or not to be kept where it
came just before, and why."""
_TOGETHER: Final = 256 * 1024
_BLOCK: Final = 512
_SEGMENTS: Final = 100_000
"""Pieces of a sparse file; one with more is sent with its holes."""
_MODE: Final = 0o1777
"""No set-user-id and set-group-id bits: the copy belongs to somebody else."""
_END: Final = bytes(2 * _BLOCK)

Tell = Callable[[str, str], None]
"""Is told of a path that was left out, and why."""


@dataclass(frozen=True)
class Source:
    """A path of this machine, and its name in the archive; `.` stands for what is in it.

    With `follow` a symbolic link is what it leads to.
    """

    path: str
    name: str
    follow: bool = False


@dataclass(frozen=True)
class _Found:
    path: str
    name: str
    status: os.stat_result


def source_of(path: str, *, recursive: bool) -> Source:
    """How `cp` would take a path: links as links when it copies trees.

    One with a slash at its end is what it leads to, and `.` or `..` at its end what is in there.
    """
    name = os.path.basename(path.rstrip("/"))
    inside = name in ("", ".", "..")
    follow = inside or not recursive or path.endswith("/")
    return Source(path, "." if inside else name, follow)


def total_size(sources: Sequence[Source]) -> int | None:
    """The bytes of a single file; None for anything else."""
    try:
        [status] = [os.stat(each.path) if each.follow else os.lstat(each.path) for each in sources]
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def pack(sources: Sequence[Source], left_out: Tell, *, recursive: bool = True) -> Iterator[bytes]:
    """The archive of `sources` and all that is below them, in pieces of some size.

    What cannot be read is left out; so are devices, pipes and sockets, directories unless
    `recursive`, and a source of the same name as one before.
    """
    waiting = bytearray()
    for piece in _pieces(sources, left_out, recursive):
        waiting += piece
        if len(waiting) >= _TOGETHER:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


def _pieces(sources: Sequence[Source], left_out: Tell, recursive: bool) -> Iterator[bytes]:
    links: dict[tuple[int, int], str] = {}
    names: set[str] = set()
    for source in sources:
        if source.name in names and source.name != ".":
            left_out(source.path, f"there is another source of the name {source.name}")
            continue
        names.add(source.name)
        if not recursive and os.path.isdir(source.path):
            left_out(source.path, "it is a directory: use -r")
            continue
        for found in _walk(source, left_out):
            yield from _entry(found, links, left_out)
    yield _END


def _walk(source: Source, left_out: Tell) -> Iterator[_Found]:
    """Each directory before what is in it."""
    waiting = [(source.path, source.name)]
    follow = source.follow
    while waiting:
        path, name = waiting.pop()
        try:
            status = os.stat(path) if follow else os.lstat(path)
            follow = False
            yield _Found(path, name, status)
            if stat.S_ISDIR(status.st_mode):
                inside = sorted(os.listdir(path), reverse=True)
                waiting += [(os.path.join(path, each), f"{name}/{each}") for each in inside]
        except OSError as error:
            left_out(path, _reason(error))


def _entry(found: _Found, links: dict[tuple[int, int], str], left_out: Tell) -> Iterator[bytes]:
    header, status = _header(found), found.status
    if stat.S_ISDIR(status.st_mode):
        header.type = tarfile.DIRTYPE
        yield _bytes(header)
    elif stat.S_ISLNK(status.st_mode):
        try:
            header.linkname = os.readlink(found.path)
        except OSError as error:
            left_out(found.path, _reason(error))
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
            left_out(found.path, _reason(error))
            return
        try:
            why = yield from _content(file, header)
        finally:
            os.close(file)
        if why is None and status.st_nlink > 1:
            links[same] = found.name
        elif why is not None:
            left_out(found.path, why)
            yield _note(found.name, why)
    else:
        left_out(found.path, "it is a device, a pipe or a socket")


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
