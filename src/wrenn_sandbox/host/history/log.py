"""What a guest writes to its console, as lines in two files of bounded size.

Each line has a number, one more than the line before. When the newer file is full it takes the
place of the older one, so that the oldest lines go; their numbers tell that there were some. The
console is hostile: what is kept of it is text, in lines of bounded length and number. All functions
block.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.wire.messages import LogLine, LogSource

FILE_BYTES: Final = 256 * 1024
"""Of each of the two files."""
LINE_BYTES: Final = 4096
"""Longer lines are divided."""
LINES_AT_ONCE: Final = 1000
"""Lines that are kept of what is read at once; the oldest of more are dropped."""
PIECE_BYTES: Final = 64 * 1024
"""What a VMM keeps of a console that nobody reads: with so much, more may have been lost."""

_KERNEL: Final = re.compile(rb"\[ *\d+\.\d{6}\] ")
_AGENT: Final = re.compile(rb"wrenn-(?:agent|init): ")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """A line as it is stored; `at` is milliseconds since 1970."""

    number: int
    at: int
    source: LogSource
    text: str

    def line(self) -> LogLine:
        at = _EPOCH + self.at * _MILLISECOND
        return LogLine(number=self.number, at=at, source=self.source, text=self.text)


_DECODE: Final = msgspec.json.Decoder(_Entry)


class SandboxLog:
    """The log of one sandbox; there are no files before the first line."""

    def __init__(self, directory: Path) -> None:
        self._newer = directory / "log"
        self._older = directory / "log.old"
        self._turn = threading.Lock()
        self._rest = b""
        """The beginning of a line whose end has not come yet."""
        self._last: int | None = None

    def add(self, data: bytes, at: datetime, *, ended: bool = False) -> None:
        """Add what a console has said since the last time; raises OSError.

        A line without an end waits for it as long as more comes, unless the guest has `ended`.
        """
        with self._turn:
            if not data and not self._rest:
                return
            pieces = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
            waits = bool(data) and not ended and len(pieces[-1]) < LINE_BYTES
            self._rest = pieces.pop() if waits else b""
            found = [part for each in pieces if each.strip() for part in _divided(each)]
            lines = [_told(each) for each in found[-LINES_AT_ONCE:]]
            if len(found) > LINES_AT_ONCE or len(data) >= PIECE_BYTES:
                lines.insert(0, (LogSource.HOST, "some lines were lost here: they came too fast"))
            if lines:
                self._write(lines, (at - _EPOCH) // _MILLISECOND)

    def _write(self, lines: list[tuple[LogSource, str]], at: int) -> None:
        if self._last is None:
            self._last = max((each.number for each in self._entries()), default=0)
        first = self._last + 1
        entries = [_Entry(first + n, at, *each) for n, each in enumerate(lines)]
        self._newer.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for begin in range(0, len(entries), 100):
            part = entries[begin : begin + 100]
            with open(self._newer, "ab", opener=_private) as file:
                file.write(b"".join(msgspec.json.encode(each) + b"\n" for each in part))
                full = file.tell() >= FILE_BYTES
            self._last = part[-1].number
            if full:
                self._newer.replace(self._older)

    def read(self, cursor: int | None, *, backward: bool, limit: int) -> list[LogLine]:
        """The next lines behind the number `cursor`, or (`backward`) before it, newest first then.

        Without one from the oldest line, or the newest. Where lines are not kept any more, one of
        the host says how many. Raises OSError.
        """
        with self._turn:
            kept = list(self._entries())
        if not kept:
            return []
        oldest = kept[0]
        lost = oldest.number - 1 if backward else oldest.number - 1 - (cursor or 0)
        hole = LogLine(
            number=oldest.number - 1,
            at=oldest.line().at,
            source=LogSource.HOST,
            text=f"{lost} earlier lines are not kept any more",
        )
        if not backward:
            found = [each.line() for each in kept if each.number > (cursor or 0)]
            return ([hole] if lost > 0 else [])[:limit] + found[: limit - (lost > 0)]
        found = [each.line() for each in reversed(kept) if cursor is None or each.number < cursor]
        if lost > 0 and (cursor is None or cursor >= oldest.number):
            found.append(hole)
        return found[:limit]

    def _entries(self) -> Iterator[_Entry]:
        """All that can be read, oldest first; a loss of power may leave a line that cannot."""
        for path in (self._older, self._newer):
            with suppress(FileNotFoundError):
                for each in path.read_bytes().split(b"\n"):
                    with suppress(msgspec.DecodeError, UnicodeDecodeError):
                        yield _DECODE.decode(each)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _divided(line: bytes) -> Iterator[bytes]:
    for begin in range(0, len(line), LINE_BYTES):
        yield line[begin : begin + LINE_BYTES]


def _told(line: bytes) -> tuple[LogSource, str]:
    """A line as text, and who seems to have written it: all of it is the guest's word."""
    source = LogSource.CONSOLE
    if match := _AGENT.match(line):
        source, line = LogSource.AGENT, line[match.end() :]
    elif _KERNEL.match(line):
        source = LogSource.KERNEL
    return source, line.decode("utf-8", "replace")
