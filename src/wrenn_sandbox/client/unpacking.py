"""A tar archive that nobody vouches for, as a tree of this machine.

Nothing outside the target is written, and no symbolic link is followed on the way. What is below
the target is reached by descriptors of directories, one name after the other.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Final

from .errors import ClientError, ConnectionFailed, UnexpectedAnswer
from .packing import LEFT_OUT, REASON, Tell

_BLOCK: Final = 512
_EXTENDED_LIMIT: Final = 1024 * 1024
"""Bytes of all extended headers of one entry: names and a few numbers."""
_MAP_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of the map of a sparse file."""
_AFTER_LIMIT: Final = 1024 * 1024
"""Bytes after the end: other programs fill up their last record."""
_DEPTH_LIMIT: Final = 1000
_SHOWN: Final = 1000
"""Characters of a name that are told."""
_MODE: Final = 0o1777
_UTC_YEAR_9999: Final = 253402300799
_NUMBER: Final = re.compile(rb"[0-9]{1,19}")
_NUMBER_LENGTH: Final = 19
_OCTAL: Final = re.compile(rb"[0-7]*")
_TIME: Final = re.compile(rb"([0-9]{1,12})(?:\.([0-9]{1,30}))?")
_FILES: Final = (b"0", b"\0", b"7")
_DIRECTORY: Final = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", 0)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)

HostContext = tuple[bytes, ...]
"""A path below the target, name by name."""

Step = Generator[None, None, None]


class _Malformed(UnexpectedAnswer):
    def __init__(self, what: str) -> None:
        super().__init__(f"the sandbox sent an archive that is not acceptable: {what}")


@dataclass
class _Header:
    name: bytes
    mode: int
    size: int
    mtime_ns: int
    type: bytes
    link: bytes
    records: dict[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Directory:
    parts: HostContext
    mode: int
    mtime_ns: int


class Unpacker:
    """Takes an archive of one file or one tree, piece by piece, and puts it at `target`.

    The names in the archive begin with a name of the sender's, in whose place `target` is; a
    directory that is there already is added to. A file takes its place when all of it has come.
    Symbolic links that lead out of the tree are left out, unless `keep_links`. Directories are
    malformed unless `recursive`. Calls raise `ClientError` for an archive that is malformed and
    for a disk that is full, and so does an empty `target`.
    """

    def __init__(
        self, target: str, left_out: Tell, *, recursive: bool = True, keep_links: bool = False
    ) -> None:
        if not target or "\0" in target:
            raise ClientError("target: must not be empty and not contain a NUL character")
        self._target = target.rstrip("/") or "/"
        self._recursive = recursive
        self._keep_links = keep_links
        self._tell = left_out
        self._buffer = bytearray()
        self._one = threading.Lock()
        self._done = False
        self._after = 0
        self._root: bytes | None = None
        self._tree: _Tree | None = None
        self._made: _MadeFile | None = None
        self._directories: list[_Directory] = []
        self._refused: HostContext | None = None
        self.is_directory = False
        self.entries = 0
        self.size = 0
        """Bytes of files that have come."""
        self.total: int | None = None
        """The size of a single file, as soon as it is known."""
        self._steps = self._unpack()
        next(self._steps)

    def feed(self, data: bytes) -> None:
        """Take the next piece of the archive; a little that comes after its end is ignored."""
        with self._one:
            if self._done:
                self._drop(len(data))
                return
            self._buffer += data
            try:
                next(self._steps)
            except StopIteration:
                self._done = True
                self._drop(len(self._buffer))
                self._buffer.clear()
            except OverflowError as error:
                raise _Malformed("a number") from error

    def finish(self) -> None:
        """To be called when all has come; `ConnectionFailed` when that was not all."""
        if not self._done:
            raise ConnectionFailed("the archive is not complete")

    def close(self) -> None:
        """Remove what is not complete; safe to repeat, and from another thread."""
        with self._one:
            self._done = True
            self._steps.close()
            if self._made is not None:
                self._made.discard()
                self._made = None
            if self._tree is not None:
                self._leave(())
                self._tree.close()
                self._tree = None

    # the archive

    def _unpack(self) -> Step:
        while (header := (yield from self._next_header())) is not None:
            if header.type == b"g":
                self._take_note(header.records)
                continue
            self._settle()
            yield from self._take(header)
        self._settle()
        self._leave(())

    def _next_header(self) -> Generator[None, None, _Header | None]:
        """The next entry's, with what its extended header says; None at the end."""
        records: dict[bytes, bytes] = {}
        extended = 0
        while True:
            block = yield from self._bytes(_BLOCK)
            if not any(block):
                if any((yield from self._bytes(_BLOCK))):
                    raise _Malformed("no end")
                return None
            header = _parsed(block)
            if header.type in (b"x", b"g"):
                extended += _BLOCK + header.size
                if extended > _EXTENDED_LIMIT:
                    raise _Malformed("a header is too long")
                body = yield from self._bytes(header.size + -header.size % _BLOCK)
                found = _records(body[: header.size])
                if header.type == b"g":
                    header.records = found
                    return header
                records |= found
                continue
            _extend(header, records)
            return header

    def _take(self, header: _Header) -> Step:
        if header.type == b"5" and not self._recursive:
            raise _Malformed("a directory came in the place of a file")
        parts = self._placed(header.name)
        if self._refused is not None and parts[: len(self._refused)] == self._refused:
            yield from self._skip(header.size)
            return
        self._leave(parts)
        self.entries += 1
        if not parts and header.type in _FILES:
            self.total = header.size
        try:
            if header.type == b"5":
                self._make_directory(parts, header)
            elif header.type in _FILES:
                yield from self._file(parts, header)
                return
            elif header.type == b"2":
                self._link(parts, header)
            elif header.type == b"1":
                self._of(parts).hard_link(parts, self._placed(header.link))
            else:
                self._tell(_shown(header.name), "it is a device or a pipe")
        except OSError as error:
            self._failed(header, error)
            if header.type == b"5":
                self._refused = parts
        yield from self._skip(header.size)

    def _failed(self, header: _Header, error: OSError) -> None:
        if error.errno in _FULL:
            raise ClientError(f"{_shown(header.name)}: {error.strerror}") from error
        self._tell(_shown(header.name), error.strerror or str(error))

    def _placed(self, name: bytes) -> HostContext:
        """Where below the target an entry belongs."""
        if name.startswith(b"/") or b"\0" in name:
            raise _Malformed("a name leads out of it")
        parts = tuple(each for each in name.split(b"/") if each not in (b"", b"."))
        if b".." in parts or len(parts) > _DEPTH_LIMIT:
            raise _Malformed("a name leads out of it")
        if self._root is None:
            self._root = parts[0] if parts else b""
        if not self._root:
            return parts
        if parts[:1] != (self._root,):
            raise _Malformed("it has more than one tree")
        return parts[1:]

    def _of(self, parts: HostContext) -> "_Tree":
        """The tree to put an entry into: a target that is no directory stands in its parent."""
        if self._tree is None:
            if not parts:
                place = os.path.realpath(self._target)
                try:
                    self._tree = _Tree(os.path.dirname(place), os.fsencode(os.path.basename(place)))
                except OSError as error:
                    raise ClientError(f"{self._target}: {error.strerror}") from error
            else:
                raise _Malformed("it does not begin with its directory")
        if parts and not self.is_directory:
            raise _Malformed("it has entries below one that is no directory")
        return self._tree

    def _make_directory(self, parts: HostContext, header: _Header) -> None:
        if parts or self._tree is not None:
            new = self._of(parts).make_directory(parts)
        else:
            new = self._make_root()
        if new:
            self._directories.append(_Directory(parts, header.mode & _MODE, header.mtime_ns))

    def _make_root(self) -> bool:
        try:
            os.mkdir(self._target, 0o700)
            new = True
        except FileExistsError:
            if not os.path.isdir(self._target):
                raise ClientError(f"{self._target}: it is there and not a directory") from None
            new = False
        except OSError as error:
            raise ClientError(f"{self._target}: {error.strerror}") from error
        self._tree = _Tree(self._target, None)
        self.is_directory = True
        return new

    def _leave(self, parts: HostContext) -> None:
        """Give directories their modes and times that nothing comes into any more."""
        while self._directories:
            last = self._directories[-1]
            if len(parts) > len(last.parts) and parts[: len(last.parts)] == last.parts:
                return
            self._directories.pop()
            assert self._tree is not None
            try:
                self._tree.finish_directory(last.parts, last.mode, last.mtime_ns)
            except OSError as error:
                self._tell(_shown(b"/".join(last.parts)), error.strerror or str(error))

    def _link(self, parts: HostContext, header: _Header) -> None:
        tree = self._of(parts)
        if not self._keep_links and not _stays(parts, header.link):
            self._tell(
                _shown(header.name), f"a link that leads out of it, to {header.link!r}"[:300]
            )
            return
        tree.symbolic_link(parts, header.link, header.mtime_ns)

    def _file(self, parts: HostContext, header: _Header) -> Step:
        try:
            made = self._made = self._of(parts).new_file(parts, header.name)
        except OSError as error:
            self._failed(header, error)
            yield from self._skip(header.size)
            return
        if not any(keyword.startswith(b"GNU.sparse.") for keyword in header.records):
            yield from self._write(made, header.size, header)
        elif header.records.get(b"GNU.sparse.major") == b"1":
            yield from self._write_sparse(made, header)
        else:
            raise _Malformed("an unknown form of sparse files")
        yield from self._bytes(-header.size % _BLOCK)
        made.mode, made.mtime_ns = header.mode & 0o777, header.mtime_ns

    def _write(self, made: "_MadeFile", size: int, header: _Header) -> Step:
        while size > 0:
            while not self._buffer:
                yield
            piece = self._buffer[:size]
            del self._buffer[:size]
            size -= len(piece)
            self.size += len(piece)
            try:
                made.write(piece)
            except OSError as error:
                self._failed(header, error)
                made.discard()

    def _write_sparse(self, made: "_MadeFile", header: _Header) -> Step:
        """The form that GNU tar calls 1.0: a map of offsets and lengths, then what is there."""
        used = 0
        text = bytearray()
        numbers: list[int] = []
        wanted = 1
        while len(numbers) < wanted:
            if used + _BLOCK > min(header.size, _MAP_LIMIT):
                raise _Malformed("the map of a sparse file")
            text += yield from self._bytes(_BLOCK)
            used += _BLOCK
            *lines, rest = text.split(b"\n")
            text = bytearray(rest)
            for line in lines:
                if len(numbers) < wanted:
                    numbers.append(_number(bytes(line)))
                    wanted = 1 + 2 * numbers[0]
            if len(numbers) < wanted and len(text) > _NUMBER_LENGTH:
                raise _Malformed("the map of a sparse file")
        size = _number(header.records.get(b"GNU.sparse.realsize", b""))
        left = header.size - used
        for at in range(1, wanted, 2):
            offset, length = numbers[at], numbers[at + 1]
            if length > left or offset + length > size:
                raise _Malformed("the map of a sparse file")
            try:
                made.seek(offset)
            except OSError as error:
                self._failed(header, error)
                made.discard()
            yield from self._write(made, length, header)
            left -= length
        yield from self._skip(left, padded=False)
        try:
            made.extend(size)
        except OSError as error:
            self._failed(header, error)
            made.discard()

    def _settle(self) -> None:
        """Give the last file its name: nothing was said against it."""
        made, self._made = self._made, None
        if made is not None:
            try:
                made.commit()
            except OSError as error:
                made.discard()
                self._tell(_shown(made.shown), error.strerror or str(error))

    def _take_note(self, records: dict[bytes, bytes]) -> None:
        name = records.get(os.fsencode(LEFT_OUT))
        if name is None:
            return
        if self._made is not None and self._made.shown == name:
            self._made.discard()
            self._made = None
        self._tell(_shown(name), _shown(records.get(os.fsencode(REASON), b""))[:300])

    # its bytes

    def _drop(self, count: int) -> None:
        self._after += count
        if self._after > _AFTER_LIMIT:
            raise _Malformed("it goes on after its end")

    def _bytes(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _skip(self, size: int, *, padded: bool = True) -> Step:
        size += -size % _BLOCK if padded else 0
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


class _Tree:
    """Where entries are put: `name` in `base`, or without one `base` itself.

    The path of `base` is the caller's own; from there on nothing is followed.
    """

    def __init__(self, base: str, name: bytes | None) -> None:
        self._base = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._top: HostContext = () if name is None else (name,)
        self._parent: tuple[HostContext, int] | None = None

    def close(self) -> None:
        self._forget()
        os.close(self._base)

    def _forget(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def make_directory(self, parts: HostContext) -> bool:
        """Whether it is new; `NotADirectoryError` when something else is there."""
        if not (*self._top, *parts):
            return False
        with self._place(parts) as (directory, name):
            try:
                os.mkdir(name, 0o700, dir_fd=directory)
            except FileExistsError:
                if not stat.S_ISDIR(_status(name, directory).st_mode):
                    raise NotADirectoryError(
                        errno.ENOTDIR, "it is there and not a directory"
                    ) from None
                return False
            return True

    def finish_directory(self, parts: HostContext, mode: int, mtime_ns: int) -> None:
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

    def new_file(self, parts: HostContext, shown: bytes) -> _MadeFile:
        with self._place(parts) as (directory, name):
            return _MadeFile(directory, name, shown)

    def symbolic_link(self, parts: HostContext, to: bytes, mtime_ns: int) -> None:
        def make(name: bytes, directory: int) -> None:
            os.symlink(to, name, dir_fd=directory)
            with contextlib.suppress(NotImplementedError, OSError):
                times = (mtime_ns, mtime_ns)
                os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)

        self._put(parts, make)

    def hard_link(self, parts: HostContext, to: HostContext) -> None:
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

    def _put(self, parts: HostContext, make: Callable[[bytes, int], None]) -> None:
        """What `make` makes takes the place of what is no directory."""
        with self._place(parts) as (directory, name):
            made = _spare_name()
            try:
                make(made, directory)
                os.rename(made, name, src_dir_fd=directory, dst_dir_fd=directory)
            finally:
                # also after a rename of one link to another of the same file, which does nothing
                with contextlib.suppress(OSError):
                    os.unlink(made, dir_fd=directory)

    @contextlib.contextmanager
    def _place(self, parts: HostContext) -> Iterator[tuple[int, bytes]]:
        """A descriptor of the directory that an entry is in, and its name there."""
        *above, name = self._full(parts)
        if self._parent is None or self._parent[0] != tuple(above):
            directory = self._opened(tuple(above))
            self._forget()
            self._parent = (tuple(above), directory)
        yield self._parent[1], name

    def _full(self, parts: HostContext) -> HostContext:
        """All names from the base on."""
        if not self._top and not parts:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return (*self._top, *parts)

    def _opened(self, parts: HostContext) -> int:
        directory = os.dup(self._base)
        try:
            for part in parts:
                below = os.open(part, _DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = below
        except OSError:
            os.close(directory)
            raise
        return directory


def _status(name: bytes, directory: int) -> os.stat_result:
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def _spare_name() -> bytes:
    return b".wrenn-" + secrets.token_hex(8).encode()


def _stays(parts: HostContext, link: bytes) -> bool:
    """Whether a symbolic link leads to a place in its own tree, whatever other links that has.

    It goes up only in the beginning, where there are none: never above the tree.
    """
    steps = [each for each in link.split(b"/") if each not in (b"", b".")]
    ups = 0
    while ups < len(steps) and steps[ups] == b"..":
        ups += 1
    return bool(link) and link[:1] != b"/" and b".." not in steps[ups:] and ups < len(parts)


def _parsed(block: bytes) -> _Header:
    summed = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
    if _octal(block[148:156]) != summed:
        raise _Malformed("a damaged header")
    name, prefix = _text(block[0:100]), b""
    if block[257:262] == b"ustar":
        prefix = _text(block[345:500])
    return _Header(
        name=prefix + b"/" + name if prefix else name,
        mode=_octal(block[100:108]),
        size=_octal(block[124:136]),
        mtime_ns=min(_octal(block[136:148]), _UTC_YEAR_9999) * 10**9,
        type=block[156:157],
        link=_text(block[157:257]),
    )


def _extend(header: _Header, records: dict[bytes, bytes]) -> None:
    header.records = records
    header.name = records.get(b"GNU.sparse.name", records.get(b"path", header.name))
    header.link = records.get(b"linkpath", header.link)
    if b"size" in records:
        header.size = _number(records[b"size"])
    if (time := _TIME.fullmatch(records.get(b"mtime", b""))) is not None:
        rest = (time[2] or b"")[:9].ljust(9, b"0")
        header.mtime_ns = min(int(time[1]), _UTC_YEAR_9999) * 10**9 + int(rest)
    if header.type in (b"1", b"2", b"5"):
        header.size = 0


def _records(body: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEYWORD=VALUE\\n`, again and again."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 8)
        if space < 0:
            raise _Malformed("an extended header")
        end = at + _number(body[at:space])
        keyword, equals, value = body[space + 1 : end].partition(b"=")
        if not (space < end <= len(body) and equals and value.endswith(b"\n")):
            raise _Malformed("an extended header")
        found[keyword] = value[:-1]
        at = end
    return found


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes) -> int:
    if field[0] == 0x80:  # binary, for numbers that are too large
        number = int.from_bytes(field[1:], "big")
        if number >= 2**63:
            raise _Malformed("a number")
        return number
    digits = field.partition(b"\0")[0].strip(b" ")
    if _OCTAL.fullmatch(digits) is None:
        raise _Malformed("a number")
    return int(digits, 8) if digits else 0


def _number(digits: bytes) -> int:
    if _NUMBER.fullmatch(digits) is None or int(digits) >= 2**63:
        raise _Malformed("a number")
    return int(digits)


def _shown(name: bytes) -> str:
    """As it is told and kept: a name that no file can have may be very long."""
    shown = os.fsdecode(name.rstrip(b"/"))
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
