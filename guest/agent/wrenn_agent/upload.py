"""Writing a file so that it is either replaced completely or not at all.

A new version takes the old one's place by a rename, which keeps it whole for everybody at every
moment. Where that would lose something (hard links, an owner that cannot be given, a mount on the
file) it is written over the old one, after its room on the disk is taken. Where nothing can be made
beside the file (`/proc`, `/sys`, a directory that cannot be written) it is just written over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zlib
from binascii import hexlify

from .body import Body
from .directories import give, make_directories
from .entries import XATTR_PREFIX
from .errors import Disconnected, FailedPrecondition, InvalidArgument, from_os_error
from .loop import Loop
from .users import User

CREATING_PREFIX, REPLACING_PREFIX = ".wrenn-upload-new-", ".wrenn-upload-"
"""Names of temporary files; they tell a watch what the final rename means."""
_GZIP = 31
"""zlib's window bits for a gzip stream."""
_INFLATED_AT_ONCE = 256 * 1024
_NEW_MODE = 0o644
_COPIED_AT_ONCE = 1024 * 1024
_HELD_LIMIT = 1024 * 1024
"""Bytes of a file that is kept in memory meanwhile, and given to the kernel in one piece."""
_NOTHING_BESIDE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS)
_KEEPS_ITS_PLACE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.ENOTSUP)


class AtomicFile:
    """A new version of the file at `path`, kept beside it until `commit()`.

    Usable as a context: what is not committed vanishes. Symlinks are followed; missing parents are
    made. A new file and its parents belong to `owner`; one that is replaced keeps owner, group,
    mode (unless `mode` is given), extended attributes and hard links. Raises AgentError (directory
    or device as target, no space, no permission).
    """

    def __init__(self, loop: Loop, path: str, owner: User, mode: int | None = None) -> None:
        self._loop = loop
        self._path = path
        self._owner = owner
        self._mode = mode
        self._committed = False
        self._temporary: str | None = None
        try:
            self._target = os.path.realpath(path)
            old = self._look()
            if old is None:
                make_directories(os.path.dirname(self._target), owner)
            self._fd = self._open_spool(replaces=old is not None)
        except (OSError, ValueError) as error:
            raise self._told(error) from error

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)
        if self._temporary is not None and not self._committed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def write(self, data: bytes) -> None:
        """Append `data`."""
        try:
            _write_all(self._fd, data)
            if self._temporary is None and os.fstat(self._fd).st_size > _HELD_LIMIT:
                raise FailedPrecondition(
                    f"{self._path}: nothing can be made beside it, so {_HELD_LIMIT} bytes is all"
                )
        except OSError as error:
            raise self._told(error) from error

    async def commit(self, metadata: dict[str, bytes]) -> None:
        """Put the file in place; `metadata`, when there is any, replaces the old version's."""
        try:
            old = self._look()
            if not self._take_its_place(old, metadata):
                await self._write_over(metadata)
        except OSError as error:
            raise self._told(error) from error

    def _look(self) -> os.stat_result | None:
        """The file that is to be replaced, None when there is none."""
        try:
            found = os.stat(self._target)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise InvalidArgument(f"{self._path} is not a regular file")
        return found

    def _open_spool(self, replaces: bool) -> int:
        """A file beside the target, or in memory where the file system takes none there."""
        prefix = REPLACING_PREFIX if replaces else CREATING_PREFIX
        name = prefix + hexlify(os.urandom(8)).decode()
        temporary = os.path.join(os.path.dirname(self._target), name)
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not replaces or error.errno not in _NOTHING_BESIDE:
                raise
            return os.memfd_create("upload")
        self._temporary = temporary
        return fd

    def _take_its_place(self, old: os.stat_result | None, metadata: dict[str, bytes]) -> bool:
        """Rename the new version over the old one; False where that would lose something of it."""
        if self._temporary is None or (old is not None and old.st_nlink > 1):
            return False
        try:
            if old is None:
                give(self._fd, self._owner, os.stat(os.path.dirname(self._target)).st_mode)
                os.fchmod(self._fd, _NEW_MODE if self._mode is None else self._mode)
                for name, value in _named(metadata).items():
                    os.setxattr(self._fd, name, value)
            else:
                self._dress_like(old, metadata)
            os.rename(self._temporary, self._target)
        except OSError as error:
            if old is None or error.errno not in _KEEPS_ITS_PLACE:
                raise
            return False
        self._committed = True
        return True

    def _dress_like(self, old: os.stat_result, metadata: dict[str, bytes]) -> None:
        ours = os.fstat(self._fd)
        if (ours.st_uid, ours.st_gid) != (old.st_uid, old.st_gid):
            os.fchown(self._fd, old.st_uid, old.st_gid)
        attributes = _attributes(self._target)
        if metadata:
            kept = {name: attributes[name] for name in attributes if not _is_metadata(name)}
            attributes = kept | _named(metadata)
        for name in _attributes(self._fd).keys() - attributes.keys():
            os.removexattr(self._fd, name)  # what the directory gives to new files
        for name, value in attributes.items():
            os.setxattr(self._fd, name, value)
        os.fchmod(self._fd, stat.S_IMODE(old.st_mode) if self._mode is None else self._mode)

    async def _write_over(self, metadata: dict[str, bytes]) -> None:
        """Write the new version into the file that is there.

        On a disk its room is taken before the first byte changes, so that a lack of it leaves the
        old version; who reads meanwhile sees parts of both.
        """
        in_memory = self._temporary is None
        # some file systems take room by reading, and some of the kernel's files are write-only
        access = os.O_WRONLY | os.O_TRUNC if in_memory else os.O_RDWR
        target = os.open(self._target, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = os.fstat(self._fd).st_size
            before = _attributes(target)
            self._describe_again(target, before, metadata)
            if not in_memory:
                _take_room(target, size)
            gone = await self._copy_to(target)
            if not in_memory:
                os.ftruncate(target, size)
            for name in before.keys() - _attributes(target).keys():
                if not (metadata and _is_metadata(name)):
                    os.setxattr(target, name, before[name])  # capabilities end with a write
            if self._mode is not None:
                os.fchmod(target, self._mode)
        finally:
            os.close(target)
        if gone is not None:
            raise gone

    def _describe_again(
        self, target: int, before: dict[str, bytes], metadata: dict[str, bytes]
    ) -> None:
        for name, value in _named(metadata).items():
            os.setxattr(target, name, value)
        for name in before.keys() - _named(metadata).keys():
            if metadata and _is_metadata(name):
                os.removexattr(target, name)

    async def _copy_to(self, target: int) -> Disconnected | None:
        """Copy all of it, whoever goes away meanwhile: half of a file is of use to nobody."""
        gone: Disconnected | None = None
        offset = 0
        while piece := os.pread(self._fd, _COPIED_AT_ONCE, offset):
            _write_all(target, piece)
            offset += len(piece)
            if len(piece) < _COPIED_AT_ONCE:
                continue
            try:
                await self._loop.breathe()
            except Disconnected as error:
                gone = error
        return gone

    def _told(self, error: OSError | ValueError) -> Exception:
        if not isinstance(error, OSError):
            return InvalidArgument("path cannot be used")
        if isinstance(error, FileExistsError | NotADirectoryError):
            return InvalidArgument(f"{self._path}: a parent is not a directory")
        return from_os_error(error, self._path)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _take_room(fd: int, size: int) -> None:
    """Make sure that `size` bytes can be written; leaves the file as it was when they cannot."""
    before = os.fstat(fd).st_size
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError:
        os.ftruncate(fd, before)
        raise


def _attributes(file: str | int) -> dict[str, bytes]:
    """The extended attributes, access lists and capabilities included."""
    try:
        return {name: os.getxattr(file, name) for name in os.listxattr(file)}
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return {}


def _named(metadata: dict[str, bytes]) -> dict[str, bytes]:
    return {XATTR_PREFIX + key: value for key, value in metadata.items()}


def _is_metadata(name: str) -> bool:
    return name.startswith(XATTR_PREFIX)


class Inflated:
    """A gzip-compressed body, decompressed in pieces of bounded size."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._inflater = zlib.decompressobj(_GZIP)
        self._pending = b""

    async def piece(self) -> bytes:
        """The next bytes, empty at the end; InvalidArgument when the data is damaged or cut."""
        while True:
            if not self._pending:
                self._pending = await self._body.piece()
                if not self._pending:
                    if not self._inflater.eof:
                        raise InvalidArgument("gzip data is cut off")
                    return b""
            if self._inflater.eof:  # another member follows
                self._inflater = zlib.decompressobj(_GZIP)
            try:
                data = self._inflater.decompress(self._pending, _INFLATED_AT_ONCE)
            except zlib.error as error:
                raise InvalidArgument("gzip data is damaged") from error
            self._pending = self._inflater.unconsumed_tail or self._inflater.unused_data
            if data:
                return data
