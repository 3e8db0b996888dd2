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

from .pack import pack
from .unpack import FULL, Refused, Unpacker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

NOT_FOUND, NOT_ACCEPTABLE, NO_SPACE, FAILED = 3, 4, 5, 6
_PIECE = 256 * 1024
_SILENCE_SEC = 600
"""How long nothing may move: who has started this is gone then."""
_TOLD = 100
"""How many paths a report names that were left out."""


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
    except Refused as error:
        return _fail(NO_SPACE if error.no_space else NOT_ACCEPTABLE, str(error))
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
    if not recursive:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise Refused("path: it is a directory: copy it recursively")
        if not stat.S_ISREG(status.st_mode):
            raise Refused("path: it is no regular file")
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    else:
        os.lstat(path)
    waiting = bytearray()
    for piece in pack(path, follow=not recursive or path.endswith("/")):
        waiting += piece
        if len(waiting) >= _PIECE:
            _write(waiting)
            waiting.clear()
    _write(waiting)


def _write(data: bytes | bytearray) -> None:
    rest = memoryview(data)
    while rest:
        signal.alarm(_SILENCE_SEC)
        rest = rest[os.write(1, rest) :]


def _unpack(path: str, needs_directory: bool) -> None:
    left_out: list[dict[str, str]] = []
    count = 0

    def tell(name: str, reason: str) -> None:
        nonlocal count
        count += 1
        if len(left_out) < _TOLD:
            left_out.append({"path": name.encode("utf-8", "replace").decode(), "reason": reason})

    unpacker = Unpacker(path, tell, needs_directory)
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
