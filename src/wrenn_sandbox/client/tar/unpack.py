"""A tar archive that nobody vouches for, as a tree.

Nothing outside the target is written, and no symbolic link is followed below it: whoever made the
archive may mean harm, and other users may move things about there meanwhile. Directories are
reached by descriptors, one name after the other.
"""

import contextlib
import errno
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator

BLOCK = 512
LEFT_OUT = "WRENN.left_out"
REASON = "WRENN.reason"
"""Keywords of a global header: what of the archive's paths is missing, or not to be kept where it
came just before, and why."""
MODE = 0o1777
"""No set-user-id and set-group-id bits: the copy belongs to somebody else."""
FILE = (b"0", b"\0", b"7")
DIRECTORY, _SYMBOLIC, _HARD = b"5", b"2", b"1"
"""Types of entries."""
_GLOBAL, _RECORDS = b"g", b"x"
_LONG = {b"L": b"path", b"K": b"linkpath"}
"""GNU's way to give a name that is too long for a header."""
_EXTENDED_LIMIT = 1024 * 1024
"""Bytes of all extended headers of one entry: names and a few numbers."""
_MAP_LIMIT = 8 * 1024 * 1024
"""Bytes of the map of a sparse file."""
_DEPTH_LIMIT = 1000
_SHOWN = 1000
"""Characters of a name that are told."""
_UTC_YEAR_9999 = 253402300799
_NUMBER = re.compile(rb"[0-9]{1,19}")
_NUMBER_LENGTH = 19
_OCTAL = re.compile(rb"[0-7]*")
_TIME = re.compile(rb"([0-9]{1,12})(?:\.([0-9]{1,30}))?")
_OPEN = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", 0)
FULL = (errno.ENOSPC, errno.EDQUOT)

Parts = tuple[bytes, ...]
"""A path below the target, name by name."""
Step = Generator[None, None, None]


class Refused(Exception):
    """The archive cannot be unpacked, or not all of it."""


class NoSpace(Refused):
    """The disk is full."""


class Malformed(Refused):
    """It is no acceptable archive; the message says what is wrong with it."""


class Incomplete(Refused):
    """The archive has no end."""


class SeveralTrees(Refused):
    """The target is no directory, and the archive has more for it than one file or tree."""


class Header:
    """What an entry is: of its block, and of the extended headers before it (`extend`)."""

    def __init__(self, block: bytes) -> None:
        summed = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
        if _octal(block[148:156]) != summed:
            raise Malformed("a damaged header")
        self.name = _text(block[0:100])
        if block[257:262] == b"ustar" and (prefix := _text(block[345:500])):
            self.name = prefix + b"/" + self.name
        self.mode = _octal(block[100:108])
        self.size = _octal(block[124:136])
        self.mtime_ns = min(_octal(block[136:148]), _UTC_YEAR_9999) * 10**9
        self.type = block[156:157]
        self.link = _text(block[157:257])
        self.records: dict[bytes, bytes] = {}

    def extend(self, records: dict[bytes, bytes]) -> None:
        self.records = records
        self.name = records.get(b"GNU.sparse.name", records.get(b"path", self.name))
        self.link = records.get(b"linkpath", self.link)
        if b"size" in records:
            self.size = _number(records[b"size"])
        if (time := _TIME.fullmatch(records.get(b"mtime", b""))) is not None:
            rest = (time[2] or b"")[:9].ljust(9, b"0")
            self.mtime_ns = min(int(time[1]), _UTC_YEAR_9999) * 10**9 + int(rest)
        if self.type in (_HARD, _SYMBOLIC, DIRECTORY):
            self.size = 0


class Unpacker(ABC):
    """Takes an archive, piece by piece, and puts what it holds into a tree.

    Where that is says `begin`. Directories that are there are added to. A file takes its place
    when all of it has come. Calls raise `Refused`; `left_out` is told of what was left out, and
    why.
    """

    def __init__(self, left_out: Callable[[str, str], None]) -> None:
        self.tell = left_out
        self.entries = 0
        self.size = 0
        """Bytes of files that have come."""
        self.after = 0
        """Bytes that have come after the end, which are ignored."""
        self._buffer = bytearray()
        self._done = False
        self._tree: Tree | None = None
        self._root: bytes | None = None
        self._one_file = False
        self._made: _MadeFile | None = None
        self._directories: list[tuple[Parts, int, int]] = []
        """Those that were made: what mode and time (ns) they are to have in the end."""
        self._refused: Parts | None = None
        self._steps = self._unpack()
        next(self._steps)

    @abstractmethod
    def begin(self, parts: Parts, header: Header) -> None:
        """Choose the tree, by the path and header of the first entry: `put_into` or `put_at`."""

    def put_into(self, directory: str, root: bytes | None, made: Header | None) -> None:
        """What comes belongs into a directory, all of it below `root` if that is not None.

        `made` is the directory's own header, where it is new.
        """
        self._tree, self._root = Tree(directory, None), root
        if made is not None:
            self._directories.append(((), made.mode & MODE, made.mtime_ns))

    def put_at(self, place: str, root: bytes, header: Header) -> None:
        """The archive has one file or tree, called `root`, and `place` is its path."""
        base, name = os.path.split(os.path.abspath(place))
        self._tree, self._root = Tree(base, os.fsencode(name)), root
        self._one_file = header.type != DIRECTORY

    def feed(self, data: bytes) -> None:
        """Take the next piece of the archive."""
        if self._done:
            self.after += len(data)
            return
        self._buffer += data
        try:
            next(self._steps)
        except StopIteration:
            self._done = True
            self.after = len(self._buffer)
            self._buffer.clear()
        except OverflowError as error:
            raise Malformed("a number") from error

    def finish(self) -> None:
        """To be called when all has come; `Incomplete` when that was not all."""
        if not self._done:
            raise Incomplete("the archive is not complete")

    def close(self) -> None:
        """Remove what is not complete; safe to repeat."""
        self._done = True
        self._steps.close()
        if self._made is not None:
            self._made.discard()
            self._made = None
        if self._tree is not None:
            self._leave(None)
            self._tree.close()
            self._tree = None

    # the archive

    def _unpack(self) -> Step:
        while (header := (yield from self._next_header())) is not None:
            if header.type == _GLOBAL:
                self.take_note(header.records)
                continue
            self._settle()
            yield from self._take(header)
        self._settle()
        self._leave(None)

    def _next_header(self) -> Generator[None, None, Header | None]:
        """The next entry's, with what its extended header says; None at the end."""
        records: dict[bytes, bytes] = {}
        extended = 0
        while True:
            block = yield from self._bytes(BLOCK)
            if not any(block):
                if any((yield from self._bytes(BLOCK))):
                    raise Malformed("no end")
                return None
            header = Header(block)
            if header.type not in (_GLOBAL, _RECORDS, *_LONG):
                header.extend(records)
                return header
            extended += BLOCK + header.size
            if extended > _EXTENDED_LIMIT:
                raise Malformed("a header is too long")
            body = (yield from self._bytes(header.size + -header.size % BLOCK))[: header.size]
            if header.type == _GLOBAL:
                header.records = _records(body)
                return header
            if header.type == _RECORDS:
                records |= _records(body)
            else:
                records[_LONG[header.type]] = _text(body)

    def _take(self, header: Header) -> Step:
        parts = self.placed(header)
        if self._refused is not None and parts[: len(self._refused)] == self._refused:
            yield from self._skip(header.size)
            return
        self._leave(parts)
        self.entries += 1
        assert self._tree is not None
        try:
            if header.type == DIRECTORY:
                if self._tree.make_directory(parts):
                    self._directories.append((parts, header.mode & MODE, header.mtime_ns))
            elif header.type in FILE:
                self._made = self._tree.new_file(parts, header.name)
            elif header.type == _SYMBOLIC:
                self.link(self._tree, parts, header)
            elif header.type == _HARD:
                self._tree.hard_link(parts, self._below(_names(header.link)))
            else:
                self.tell(shown(header.name), "it is a device, a pipe or of an unknown kind")
        except OSError as error:
            self._failed(header, error)
            if header.type == DIRECTORY:
                self._refused = parts
        if self._made is not None:
            yield from self._content(self._made, header)
        else:
            yield from self._skip(header.size)

    def link(self, tree: "Tree", parts: Parts, header: Header) -> None:
        """Make a symbolic link, or tell why not."""
        tree.symbolic_link(parts, header.link, header.mtime_ns)

    def take_note(self, records: dict[bytes, bytes]) -> None:
        """The sender says that a path was left out: what came of it does not stay."""
        if self._made is not None and self._made.shown == records.get(LEFT_OUT.encode()):
            self._made.discard()
            self._made = None

    def _failed(self, header: Header, error: OSError) -> None:
        if error.errno in FULL:
            raise NoSpace(f"{shown(header.name)}: {error.strerror}") from error
        self.tell(shown(header.name), error.strerror or str(error))

    def placed(self, header: Header) -> Parts:
        """Where below the tree an entry belongs; the first one says what the tree is."""
        parts = _names(header.name)
        if self._tree is None:
            if not parts and header.type != DIRECTORY:
                raise Malformed("a name")
            self.begin(parts, header)
        elif self._one_file:
            raise SeveralTrees
        return self._below(parts)

    def _below(self, parts: Parts) -> Parts:
        if self._root is None:
            return parts
        if parts[:1] != (self._root,):
            raise SeveralTrees
        return parts[1:]

    def _leave(self, parts: Parts | None) -> None:
        """Give directories that `parts` is not in, None for all, their modes and times."""
        while self._directories:
            last, mode, mtime_ns = self._directories[-1]
            if parts is not None and parts[: len(last)] == last:
                return
            self._directories.pop()
            assert self._tree is not None
            try:
                self._tree.finish_directory(last, mode, mtime_ns)
            except OSError as error:
                self.tell(shown(b"/".join(last)), error.strerror or str(error))

    def _content(self, made: "_MadeFile", header: Header) -> Step:
        if not any(keyword.startswith(b"GNU.sparse.") for keyword in header.records):
            yield from self._write(made, header.size, header)
        elif header.records.get(b"GNU.sparse.major") == b"1":
            yield from self._write_sparse(made, header)
        else:
            raise Malformed("an unknown form of sparse files")
        yield from self._bytes(-header.size % BLOCK)
        made.mode, made.mtime_ns = header.mode & 0o777, header.mtime_ns

    @contextlib.contextmanager
    def _kept(self, made: "_MadeFile", header: Header) -> Iterator[None]:
        """A file that cannot be written is left out; its bytes are still read."""
        try:
            yield
        except OSError as error:
            self._failed(header, error)
            made.discard()

    def _write(self, made: "_MadeFile", size: int, header: Header) -> Step:
        while size > 0:
            while not self._buffer:
                yield
            piece = self._buffer[:size]
            del self._buffer[:size]
            size -= len(piece)
            self.size += len(piece)
            with self._kept(made, header):
                made.write(piece)

    def _write_sparse(self, made: "_MadeFile", header: Header) -> Step:
        """The form that GNU tar calls 1.0: a map of offsets and lengths, then what is there."""
        used = 0
        text = bytearray()
        numbers: list[int] = []
        wanted = 1
        while len(numbers) < wanted:
            if used + BLOCK > min(header.size, _MAP_LIMIT):
                raise Malformed("the map of a sparse file")
            text += yield from self._bytes(BLOCK)
            used += BLOCK
            *lines, rest = text.split(b"\n")
            text = bytearray(rest)
            for line in lines:
                if len(numbers) < wanted:
                    numbers.append(_number(bytes(line)))
                    wanted = 1 + 2 * numbers[0]
            if len(numbers) < wanted and len(text) > _NUMBER_LENGTH:
                raise Malformed("the map of a sparse file")
        size = _number(header.records.get(b"GNU.sparse.realsize", b""))
        left = header.size - used
        for at in range(1, wanted, 2):
            offset, length = numbers[at], numbers[at + 1]
            if length > left or offset + length > size:
                raise Malformed("the map of a sparse file")
            with self._kept(made, header):
                made.seek(offset)
            yield from self._write(made, length, header)
            left -= length
        yield from self._skip(left, padded=False)
        with self._kept(made, header):
            made.extend(size)

    def _settle(self) -> None:
        """Give the last file its name: nothing was said against it."""
        made, self._made = self._made, None
        if made is not None:
            try:
                made.commit()
            except OSError as error:
                made.discard()
                self.tell(shown(made.shown), error.strerror or str(error))

    # its bytes

    def _bytes(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _skip(self, size: int, *, padded: bool = True) -> Step:
        size += -size % BLOCK if padded else 0
        while size > 0:
            while not self._buffer:
                yield
            count = min(size, len(self._buffer))
            del self._buffer[:count]
            size -= count


class _MadeFile:
    """A file under another name, until it is complete."""

    def __init__(self, directory: int, name: bytes, shown: bytes) -> None:
        self._directory = os.dup(directory)
        self._name = name
        self._made = _spare_name()
        self.shown = shown
        self.mode = 0o600
        self.mtime_ns = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.open(self._made, flags, 0o600, dir_fd=directory)
        except OSError:
            os.close(self._directory)
            raise

    def write(self, data: bytes | bytearray) -> None:
        rest = memoryview(data)
        while rest and self._file >= 0:
            rest = rest[os.write(self._file, rest) :]

    def seek(self, offset: int) -> None:
        if self._file >= 0:
            os.lseek(self._file, offset, os.SEEK_SET)

    def extend(self, size: int) -> None:
        if self._file >= 0:
            os.ftruncate(self._file, size)

    def commit(self) -> None:
        """Give it its mode, that of the file whose place it takes, its time and its name."""
        if self._file >= 0:
            with contextlib.suppress(FileNotFoundError):
                there = _status(self._name, self._directory)
                if stat.S_ISREG(there.st_mode):
                    self.mode = there.st_mode & 0o777
            os.fchmod(self._file, self.mode)
            os.utime(self._file, ns=(self.mtime_ns, self.mtime_ns))
            os.rename(
                self._made, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory
            )
            self._close()

    def discard(self) -> None:
        """Remove it; safe to repeat, and nothing after a commit."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._made, dir_fd=self._directory)
            self._close()

    def _close(self) -> None:
        os.close(self._file)
        os.close(self._directory)
        self._file = -1


class Tree:
    """Where entries are put: `name` in `base`, or without one `base` itself.

    The path of `base` is the caller's own; from there on nothing is followed.
    """

    def __init__(self, base: str, name: bytes | None) -> None:
        self._base = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._top: Parts = () if name is None else (name,)
        self._parent: tuple[Parts, int] | None = None

    def close(self) -> None:
        self._forget()
        os.close(self._base)

    def _forget(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def make_directory(self, parts: Parts) -> bool:
        """Whether it is new; `NotADirectoryError` when something else is there."""
        if not (*self._top, *parts):
            return False
        directory, name = self._place(parts)
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            if not stat.S_ISDIR(_status(name, directory).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "it is there and not a directory") from None
            return False
        return True

    def finish_directory(self, parts: Parts, mode: int, mtime_ns: int) -> None:
        directory = self._opened((*self._top, *parts))
        try:
            file = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            try:
                os.utime(file, ns=(mtime_ns, mtime_ns))
                os.fchmod(file, mode)
            finally:
                os.close(file)
        finally:
            os.close(directory)

    def new_file(self, parts: Parts, shown: bytes) -> _MadeFile:
        directory, name = self._place(parts)
        return _MadeFile(directory, name, shown)

    def symbolic_link(self, parts: Parts, to: bytes, mtime_ns: int) -> None:
        def make(name: bytes, directory: int) -> None:
            os.symlink(to, name, dir_fd=directory)
            with contextlib.suppress(NotImplementedError, OSError):
                times = (mtime_ns, mtime_ns)
                os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)

        self._put(parts, make)

    def hard_link(self, parts: Parts, to: Parts) -> None:
        *above, last = self._full(to)
        source = self._opened(tuple(above))
        try:
            if not stat.S_ISREG(_status(last, source).st_mode):
                raise OSError(errno.EPERM, "it is a link to what is no file")

            def make(name: bytes, directory: int) -> None:
                os.link(last, name, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)

            self._put(parts, make)
        finally:
            os.close(source)

    def _put(self, parts: Parts, make: Callable[[bytes, int], None]) -> None:
        """What `make` makes takes the place of what is no directory."""
        directory, name = self._place(parts)
        made = _spare_name()
        try:
            make(made, directory)
            os.rename(made, name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            # also after a rename of one link to another of the same file, which does nothing
            with contextlib.suppress(OSError):
                os.unlink(made, dir_fd=directory)

    def _place(self, parts: Parts) -> tuple[int, bytes]:
        """A descriptor of the directory that an entry is in, and its name there."""
        *above, name = self._full(parts)
        if self._parent is None or self._parent[0] != tuple(above):
            directory = self._opened(tuple(above), make=True)
            self._forget()
            self._parent = (tuple(above), directory)
        return self._parent[1], name

    def _full(self, parts: Parts) -> Parts:
        """All names from the base on."""
        if not self._top and not parts:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return (*self._top, *parts)

    def _opened(self, parts: Parts, make: bool = False) -> int:
        directory = os.dup(self._base)
        try:
            for part in parts:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=directory)
                below = os.open(part, _OPEN, dir_fd=directory)
                os.close(directory)
                directory = below
        except OSError:
            os.close(directory)
            raise
        return directory


def _status(name: bytes, directory: int) -> os.stat_result:
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def _spare_name() -> bytes:
    return b".wrenn-" + os.urandom(8).hex().encode()


def _names(path: bytes) -> Parts:
    parts = tuple(each for each in path.split(b"/") if each not in (b"", b"."))
    if path.startswith(b"/") or b"\0" in path or b".." in parts or len(parts) > _DEPTH_LIMIT:
        raise Malformed("a name leads out of it")
    return parts


def _records(body: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEYWORD=VALUE\\n`, again and again."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 8)
        if space < 0:
            raise Malformed("an extended header")
        end = at + _number(body[at:space])
        keyword, equals, value = body[space + 1 : end].partition(b"=")
        if not (space < end <= len(body) and equals and value.endswith(b"\n")):
            raise Malformed("an extended header")
        found[keyword] = value[:-1]
        at = end
    return found


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes) -> int:
    if field[0] == 0x80:  # binary, for numbers that are too large
        number = int.from_bytes(field[1:], "big")
        if number >= 2**63:
            raise Malformed("a number")
        return number
    digits = field.partition(b"\0")[0].strip(b" ")
    if _OCTAL.fullmatch(digits) is None:
        raise Malformed("a number")
    return int(digits, 8) if digits else 0


def _number(digits: bytes) -> int:
    if _NUMBER.fullmatch(digits) is None or int(digits) >= 2**63:
        raise Malformed("a number")
    return int(digits)


def shown(name: bytes) -> str:
    """As it is told and kept: a name that no file can have may be very long."""
    shown = os.fsdecode(name.rstrip(b"/"))
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
