"""An archive of the sandbox's, unpacked on this machine."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Final

from .errors import ClientError, ConnectionFailed, UnexpectedAnswer
from .tar import unpack
from .tar.pack import Tell
from .tar.unpack import DIRECTORY, FILE, LEFT_OUT, REASON, Header, Malformed, Parts, Tree, shown

_AFTER_LIMIT: Final = 1024 * 1024
"""Bytes after the end: other programs fill up their last record."""
_TOLD: Final = 300
"""Characters of a reason."""


class Unpacker(unpack.Unpacker):
    """Takes an archive of one file or one tree, piece by piece, and puts it at `target`.

    The names in the archive begin with a name of the sender's, in whose place `target` is; a
    directory that is there already is added to. Symbolic links that lead out of the tree are left
    out, unless `keep_links`. Directories are malformed unless `recursive`. Calls raise
    `ClientError` for an archive that is malformed and for a disk that is full, and so does an
    empty `target`; they may come from several threads.
    """

    def __init__(
        self, target: str, left_out: Tell, *, recursive: bool = True, keep_links: bool = False
    ) -> None:
        if not target or "\0" in target:
            raise ClientError("target: must not be empty and not contain a NUL character")
        super().__init__(left_out)
        self._target = target.rstrip("/") or "/"
        self._recursive = recursive
        self._keep_links = keep_links
        self._one = threading.Lock()
        self.total: int | None = None
        """The size of a single file, as soon as it is known."""

    def feed(self, data: bytes) -> None:
        with self._one, _translated():
            super().feed(data)
            if self.after > _AFTER_LIMIT:
                raise Malformed("it goes on after its end")

    def finish(self) -> None:
        with _translated():
            super().finish()

    def close(self) -> None:
        with self._one:
            super().close()

    def placed(self, header: Header) -> Parts:
        if header.type == DIRECTORY and not self._recursive:
            raise Malformed("a directory came in the place of a file")
        return super().placed(header)

    def begin(self, parts: Parts, header: Header) -> None:
        if len(parts) > 1:
            raise Malformed("it does not begin with its directory")
        try:
            if header.type == DIRECTORY:
                self.put_into(self._target, parts[0] if parts else None, self._made_root(header))
            else:
                self.put_at(os.path.realpath(self._target), parts[0], header)
        except OSError as error:
            raise ClientError(f"{self._target}: {error.strerror}") from error
        if header.type in FILE:
            self.total = header.size

    def _made_root(self, header: Header) -> Header | None:
        try:
            os.mkdir(self._target, 0o700)
        except FileExistsError:
            if not os.path.isdir(self._target):
                raise ClientError(f"{self._target}: it is there and not a directory") from None
            return None
        return header

    def link(self, tree: Tree, parts: Parts, header: Header) -> None:
        if self._keep_links or _stays(parts, header.link):
            super().link(tree, parts, header)
        else:
            why = f"a link that leads out of it, to {header.link!r}"
            self.tell(shown(header.name), why[:_TOLD])

    def take_note(self, records: dict[bytes, bytes]) -> None:
        super().take_note(records)
        if (name := records.get(LEFT_OUT.encode())) is not None:
            self.tell(shown(name), shown(records.get(REASON.encode(), b""))[:_TOLD])


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The archive's errors as those of the client."""
    try:
        yield
    except (Malformed, unpack.SeveralTrees) as error:
        what = str(error) or "it has more than one tree"
        raise UnexpectedAnswer(
            f"the sandbox sent an archive that is not acceptable: {what}"
        ) from error
    except unpack.Incomplete as error:
        raise ConnectionFailed(str(error)) from error
    except unpack.Refused as error:
        raise ClientError(str(error)) from error


def _stays(parts: Parts, link: bytes) -> bool:
    """Whether a symbolic link leads to a place in its own tree, whatever other links that has.

    It goes up only in the beginning, where there are none: never above the tree.
    """
    steps = [each for each in link.split(b"/") if each not in (b"", b".")]
    ups = 0
    while ups < len(steps) and steps[ups] == b"..":
        ups += 1
    return bool(link) and link[:1] != b"/" and b".." not in steps[ups:] and ups < len(parts)
