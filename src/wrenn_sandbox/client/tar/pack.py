"""Trees as a tar archive, in pieces."""

import os
import stat
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence

from .unpack import BLOCK, LEFT_OUT, MODE, REASON

PIECE = 1024 * 1024
_TOGETHER = 256 * 1024
_SEGMENTS = 100_000
"""Pieces of a sparse file; one with more is sent with its holes."""
_KERNEL = ("proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "tracefs", "debugfs", "securityfs")
"""File systems that hold what the kernel says, and no files; one of them is read when asked for."""

Tell = Callable[[str, str], None]
"""Is told of a path that was left out, and why."""


class Source:
    """A path, and its name in the archive; `.` stands for what is in it.

    With `follow` a symbolic link is what it leads to.
    """

    def __init__(self, path: str, name: str, follow: bool = False) -> None:
        self.path = path
        self.name = name
        self.follow = follow


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


def pack(
    sources: Sequence[Source], left_out: Tell | None = None, *, recursive: bool = True
) -> Iterator[bytes]:
    """The archive of `sources` and all that is below them, in pieces of some size.

    What cannot be read is left out; so are devices, pipes and sockets, directories unless
    `recursive`, and a source of the same name as one before. A global header in its place says
    so; `left_out` is told as well. Without `left_out` any reader of tar archives can read it.
    """
    waiting = bytearray()
    for piece in _Packer(left_out).pieces(sources, recursive):
        waiting += piece
        if len(waiting) >= _TOGETHER:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


class _Packer:
    def __init__(self, left_out: Tell | None) -> None:
        self._tell = left_out
        self._links: dict[tuple[int, int], str] = {}
        """Names of files that have several, by device and number."""
        self._top: tarfile.TarInfo | None = None
        self._noted = False
        """The last header is a note."""

    def pieces(self, sources: Sequence[Source], recursive: bool) -> Iterator[bytes]:
        names: set[str] = set()
        for source in sources:
            if source.name in names and source.name != ".":
                why = f"there is another source of the name {source.name}"
                yield self._note(source.path, source.name, why)
            elif not recursive and os.path.isdir(source.path):
                yield self._note(source.path, source.name, "it is a directory: use -r")
            else:
                yield from self._tree(source)
            names.add(source.name)
        if self._noted and self._tell is None and self._top is not None and self._top.isdir():
            yield _bytes(self._top)  # other readers want an entry after each global header
        yield bytes(2 * BLOCK)

    def _tree(self, source: Source) -> Iterator[bytes]:
        """Each directory before what is in it."""
        waiting = [(source.path, source.name)]
        top, skipped, kernel = os.path.realpath(source.path), len(source.name), _kernel_mounts()
        first = True
        while waiting:
            path, name = waiting.pop()
            try:
                status = os.stat(path) if first and source.follow else os.lstat(path)
                why = yield from self._entry(path, name, status)
                if stat.S_ISDIR(status.st_mode):
                    if not first and top.rstrip("/") + name[skipped:] in kernel:
                        why = "it is the kernel's"
                    else:
                        inside = sorted(os.listdir(path), reverse=True)
                        waiting += [(os.path.join(path, each), f"{name}/{each}") for each in inside]
            except OSError as error:
                why = _reason(error)
            if why is not None:
                yield self._note(path, name, why)
            first = False

    def _entry(
        self, path: str, name: str, status: os.stat_result
    ) -> Generator[bytes, None, str | None]:
        """A path's header and content; returns why it is not to be kept, where it is not.

        Raises OSError before anything is sent.
        """
        header = _header(name, status)
        if stat.S_ISREG(status.st_mode):
            same = (status.st_dev, status.st_ino)
            if same not in self._links:
                why = yield from self._file(path, header)
                if why is None and status.st_nlink > 1:
                    self._links[same] = name
                return why
            header.type, header.linkname = tarfile.LNKTYPE, self._links[same]
        elif stat.S_ISLNK(status.st_mode):
            header.type, header.linkname = tarfile.SYMTYPE, os.readlink(path)
        elif stat.S_ISDIR(status.st_mode):
            header.type = tarfile.DIRTYPE
        else:
            return "it is a device, a pipe or a socket"
        yield self._sent(header)
        return None

    def _file(self, path: str, header: tarfile.TarInfo) -> Generator[bytes, None, str | None]:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return (yield from self._content(file, header))
        finally:
            os.close(file)

    def _content(self, file: int, header: tarfile.TarInfo) -> Generator[bytes, None, str | None]:
        try:
            whole = _whole(file)
            if whole is not None:
                header.size = len(whole)
                yield self._sent(header)
                yield whole + bytes(-len(whole) % BLOCK)
                return None
            size = os.fstat(file).st_size
            if size < PIECE:  # less than what was read
                yield self._sent(header)
                return "its size is not known"
            segments = _segments(file, size)
        except OSError as error:
            yield self._sent(header)
            return _reason(error)
        if segments is None:
            header.size = size
            yield self._sent(header)
            return (yield from _data(file, [(0, size)], size))
        numbers = (len(segments), *(each for pair in segments for each in pair))
        sparse_map = "".join(f"{number}\n" for number in numbers).encode()
        sparse_map += bytes(-len(sparse_map) % BLOCK)
        stored = sum(length for _, length in segments)
        header.size = len(sparse_map) + stored
        header.pax_headers = {
            **header.pax_headers,
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": header.name,
            "GNU.sparse.realsize": str(size),
        }
        yield self._sent(header)
        yield sparse_map
        return (yield from _data(file, segments, stored))

    def _sent(self, header: tarfile.TarInfo) -> bytes:
        self._top = self._top or header
        self._noted = False
        return _bytes(header)

    def _note(self, path: str, name: str, why: str) -> bytes:
        """A header that says that a path was left out."""
        self._noted = True
        if self._tell is not None:
            self._tell(path, why)
        return tarfile.TarInfo.create_pax_global_header({LEFT_OUT: name, REASON: why})


def _kernel_mounts() -> set[str]:
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            mounts = [line.split(" ") for line in file]
    except OSError:
        return set()
    return {mount[1] for mount in mounts if len(mount) > 2 and mount[2] in _KERNEL}


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
    yield bytes(-stored % BLOCK)
    return why


def _header(name: str, status: os.stat_result) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.mode = status.st_mode & MODE
    seconds, rest = divmod(status.st_mtime_ns, 10**9)
    header.mtime = max(0, seconds)
    if seconds >= 0:
        header.pax_headers = {"mtime": f"{seconds}.{rest:09}"}
    return header


def _bytes(header: tarfile.TarInfo) -> bytes:
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
