"""The bounded memory of what a process has said, and its readers.

Pieces of output are numbered; each reader has its own place. Old pieces are forgotten once the log
is over its limit, but never a piece that a reader has not taken: the process is not read any
further instead (`full`), so that it blocks on its pipe.
"""

from __future__ import annotations

from collections import deque

from .loop import Loop, Notice

PIECE_OVERHEAD = 128
"""Bytes that a piece costs on top of its data."""
_COALESCE_BELOW = 4096

Piece = tuple[str, bytes]
"""Channel (`stdout`, `stderr` or `pty`) and data."""


class Budget:
    """Memory of all logs together; when it runs short, each log may keep less."""

    GENEROUS = 1024 * 1024
    FRUGAL = 64 * 1024
    SHORT_ABOVE = 32 * 1024 * 1024

    def __init__(self) -> None:
        self.used = 0

    @property
    def per_log(self) -> int:
        """Bytes that one log may keep now."""
        return self.GENEROUS if self.used < self.SHORT_ABOVE else self.FRUGAL


class Reader:
    """A place in a log."""

    __slots__ = ("next",)

    def __init__(self, first: int) -> None:
        self.next = first


class OutputLog:
    """The last output of one process."""

    def __init__(self, loop: Loop, budget: Budget) -> None:
        self._budget = budget
        self._pieces: deque[tuple[int, Piece]] = deque()
        """Each with the cost of everything said before it."""
        self._first = 0
        self._cost = 0
        self._readers: list[Reader] = []
        self.changed = Notice(loop)
        """There is more to read, or the process has ended."""

    @property
    def full(self) -> bool:
        """Whether the slowest reader is so far behind that no more should be read."""
        if not self._readers:
            return False
        slowest = min(reader.next for reader in self._readers) - self._first
        if slowest >= len(self._pieces):
            return False
        return self._cost - self._pieces[max(slowest, 0)][0] >= self._budget.per_log

    @property
    def has_readers(self) -> bool:
        """Whether anyone is attached."""
        return bool(self._readers)

    def append(self, channel: str, data: bytes) -> None:
        """Add output and forget what is too old."""
        if not self._readers and self._pieces and len(data) < _COALESCE_BELOW:
            data = self._take_last(channel) + data
        cost = len(data) + PIECE_OVERHEAD
        self._pieces.append((self._cost, (channel, data)))
        self._cost += cost
        self._budget.used += cost
        self._trim()
        self.changed.notify()

    def attach(self, from_start: bool) -> Reader:
        """A new reader, at the oldest kept piece or at the end."""
        reader = Reader(self._first if from_start else self._first + len(self._pieces))
        self._readers.append(reader)
        return reader

    def detach(self, reader: Reader) -> None:
        """Forget a reader; what only it needed may go."""
        self._readers.remove(reader)
        self._trim()

    def take(self, reader: Reader, limit: int) -> list[Piece]:
        """The next pieces for `reader`, about `limit` bytes at most; empty when it is current."""
        index = max(reader.next - self._first, 0)
        pieces: list[Piece] = []
        size = 0
        while index < len(self._pieces) and size < limit:
            piece = self._pieces[index][1]
            pieces.append(piece)
            size += len(piece[1])
            index += 1
        reader.next = self._first + index
        return pieces

    def has_more(self, reader: Reader) -> bool:
        """Whether `take()` would give anything."""
        return reader.next < self._first + len(self._pieces)

    def clear(self) -> None:
        """Give all memory back."""
        self._first += len(self._pieces)
        self._budget.used -= self._kept
        self._pieces.clear()

    @property
    def _kept(self) -> int:
        return self._cost - self._pieces[0][0] if self._pieces else 0

    def _take_last(self, channel: str) -> bytes:
        before, (last_channel, last) = self._pieces[-1]
        if last_channel != channel or len(last) >= _COALESCE_BELOW:
            return b""
        self._pieces.pop()
        self._budget.used -= self._cost - before
        self._cost = before
        return last

    def _trim(self) -> None:
        limit = self._budget.per_log
        needed = min((reader.next for reader in self._readers), default=None)
        while len(self._pieces) > 1 and self._kept > limit:
            if needed is not None and self._first >= needed:
                return
            before, _ = self._pieces.popleft()
            self._first += 1
            self._budget.used -= self._pieces[0][0] - before
