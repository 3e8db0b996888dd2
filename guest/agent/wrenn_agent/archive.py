"""Packs and unpacks tar archives: a program of its own, started like any command.

    main.py archive pack PATH [--recursive]     the archive on standard output
    main.py archive unpack PATH [--directory]   the archive on standard input, a report on output

`PATH` is base64. It runs as the user whose files they are, in the limits of commands. Exit codes
besides 0 say of what kind the failure is that standard error has in words.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import sys

from .tar.unpack import (
    DIRECTORY,
    FULL,
    Incomplete,
    Malformed,
    NoSpace,
    Refused,
    SeveralTrees,
    Unpacker,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from .tar.unpack import Header, Parts

NOT_FOUND, NOT_ACCEPTABLE, NO_SPACE, FAILED = 3, 4, 5, 6
_PIECE = 256 * 1024
_SILENCE_SEC = 600
"""How long nothing may move: who has started this is gone then."""
_TOLD = 100
"""How many paths a report names that were left out."""
_SEVERAL = "path: it is not a directory, which several sources need"


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGALRM, _stop)
    try:
        path = os.fsdecode(base64.b64decode(arguments[1], validate=True))
        if arguments[0] == "pack":
            _pack(path, arguments[2:] == ["--recursive"])
        else:
            _unpack(path, arguments[2:] == ["--directory"])
    except NoSpace as error:
        return _fail(NO_SPACE, str(error))
    except Malformed as error:
        return _fail(NOT_ACCEPTABLE, f"body: not an acceptable tar archive: {error}")
    except Incomplete as error:
        return _fail(NOT_ACCEPTABLE, f"body: {error}")
    except Refused as error:
        return _fail(NOT_ACCEPTABLE, str(error) or _SEVERAL)
    except FileNotFoundError as error:
        return _fail(NOT_FOUND, f"path: {error.strerror}")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        return _fail(NOT_ACCEPTABLE, f"path: {error.strerror}")
    except OSError as error:
        code = NO_SPACE if error.errno in FULL else FAILED
        return _fail(code, error.strerror or str(error))
    return 0


def _fail(code: int, message: str) -> int:
    sys.stderr.write(message + "\n")
    return code


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(FAILED)


def _pack(path: str, recursive: bool) -> None:
    from .tar.pack import pack, source_of  # with a module that is large

    if not recursive:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise Refused("path: it is a directory: copy it recursively")
        if not stat.S_ISREG(status.st_mode):
            raise Refused("path: it is no regular file")
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    else:
        os.lstat(path)
    for piece in pack([source_of(path, recursive=recursive)]):
        _write(piece)


def _write(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        signal.alarm(_SILENCE_SEC)
        rest = rest[os.write(1, rest) :]


class _Target(Unpacker):
    """Puts an archive where `cp` would.

    Into `target` when that is a directory or its name ends with a slash; else the archive has one
    file or one tree, in whose place `target` is. One that begins with `.` is `target` itself.
    """

    def __init__(self, target: str, left_out: Callable[[str, str], None], directory: bool) -> None:
        if not target or "\0" in target:
            raise Refused("path: must not be empty and not contain a NUL character")
        super().__init__(left_out)
        self._target = target
        self.into = target.endswith("/") or os.path.isdir(target)
        """Whether what comes is put into `target`, under its own name."""
        if directory and not self.into:
            raise SeveralTrees

    def begin(self, parts: Parts, header: Header) -> None:
        self.into = self.into and bool(parts)
        if not parts or self.into:
            new = not parts and not os.path.isdir(self._target)
            os.makedirs(self._target, exist_ok=True)
            self.put_into(self._target, None, header if new else None)
            return
        place = self._target if header.type == DIRECTORY else os.path.realpath(self._target)
        if header.type == DIRECTORY and os.path.lexists(place):
            raise Refused("path: it is there and not a directory")
        os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
        self.put_at(place, parts[0], header)


def _unpack(path: str, needs_directory: bool) -> None:
    left_out: list[dict[str, str]] = []
    count = 0

    def tell(name: str, reason: str) -> None:
        nonlocal count
        count += 1
        if len(left_out) < _TOLD:
            left_out.append({"path": name.encode("utf-8", "replace").decode(), "reason": reason})

    unpacker = _Target(path, tell, needs_directory)
    try:
        _feed(unpacker.feed)
        unpacker.finish()
    finally:
        unpacker.close()
    report = {
        "entries": unpacker.entries,
        "size": unpacker.size,
        "into": unpacker.into,
        "left_out": left_out,
        "left_out_count": count,
    }
    _write(json.dumps(report).encode() + b"\n")


def _feed(feed: Callable[[bytes], None]) -> None:
    while True:
        signal.alarm(_SILENCE_SEC)
        data = os.read(0, _PIECE)
        if not data:
            return
        feed(data)
