"""Writing a file so that it is either replaced completely or not at all."""

from __future__ import annotations

import os
import stat
import zlib
from binascii import hexlify

from .body import Body
from .entries import XATTR_PREFIX
from .errors import InvalidArgument, from_os_error
from .users import ActingAs, User

CREATING_PREFIX, REPLACING_PREFIX = ".wrenn-upload-new-", ".wrenn-upload-"
"""Names of temporary files; they tell a watch what the final rename means."""
_GZIP = 31
"""zlib's window bits for a gzip stream."""
_INFLATED_AT_ONCE = 256 * 1024


class AtomicFile:
    """A new version of the file at `path`, in a temporary file beside it until `commit()`.

    Usable as a context: what is not committed vanishes. Symlinks are followed; missing parents are
    made. Raises AgentError (directory or device as target, no space, no permission).
    """

    def __init__(self, path: str, user: User) -> None:
        self._path = path
        self._user = user
        self._committed = False
        with ActingAs(user):
            try:
                self._target = os.path.realpath(path)
                self._replaces = os.path.lexists(self._target)
                self._mode = self._check_target()
                folder = os.path.dirname(self._target)
                os.makedirs(folder, 0o755, exist_ok=True)
                self._temporary = os.path.join(folder, _temporary_name(self._replaces))
                self._fd = os.open(
                    self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
                )
            except (OSError, ValueError) as error:
                raise self._told(error) from error

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._committed:
            os.close(self._fd)
            self._unlink()

    def write(self, data: bytes) -> None:
        """Append `data`."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise self._told(error) from error

    def commit(self, metadata: dict[str, bytes]) -> None:
        """Put the file in place, with its mode and `metadata` (kept as extended attributes)."""
        try:
            os.fchmod(self._fd, self._mode)
            for key, value in metadata.items():
                os.setxattr(self._fd, XATTR_PREFIX + key, value)
            with ActingAs(self._user):
                os.rename(self._temporary, self._target)
        except OSError as error:
            raise self._told(error) from error
        self._committed = True
        os.close(self._fd)

    def _check_target(self) -> int:
        """The mode that the new version gets."""
        try:
            mode = os.stat(self._target).st_mode
        except FileNotFoundError:
            return 0o644
        if not stat.S_ISREG(mode):
            raise InvalidArgument(f"{self._path} is not a regular file")
        return stat.S_IMODE(mode)

    def _unlink(self) -> None:
        with ActingAs(self._user):
            try:
                os.unlink(self._temporary)
            except FileNotFoundError:
                return

    def _told(self, error: OSError | ValueError) -> Exception:
        if not isinstance(error, OSError):
            return InvalidArgument("path cannot be used")
        if isinstance(error, FileExistsError | NotADirectoryError):
            return InvalidArgument(f"{self._path}: a parent is not a directory")
        return from_os_error(error, self._path)


def _temporary_name(replaces: bool) -> str:
    prefix = REPLACING_PREFIX if replaces else CREATING_PREFIX
    return prefix + hexlify(os.urandom(8)).decode()


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
