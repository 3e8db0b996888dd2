"""Pipes of commands that have ended while something that they started still writes to them."""

from __future__ import annotations

import os
import select
from functools import partial

from .loop import Loop, Timer

MAX_PIPES = 4096
_PIECE = 1024 * 1024
_FLOOD = 32 * 1024
_PAUSE_SECONDS = 0.02


class Drain:
    """Reads such pipes to their end and throws away what comes, so that no writer notices.

    One that floods its pipe waits a moment after each pipeful. Beyond 4096 pipes the oldest is
    closed.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._null = os.open(os.devnull, os.O_WRONLY)
        self._pipes: dict[int, Timer | None] = {}
        """With the timer of one that waits."""

    def add(self, fd: int) -> None:
        """Take over the reading end of a pipe, which must not be registered with the loop."""
        self._watch(fd)
        if len(self._pipes) > MAX_PIPES:
            self._close(next(iter(self._pipes)))

    def _watch(self, fd: int) -> None:
        self._pipes[fd] = None
        self._loop.register(fd, select.EPOLLIN, partial(self._discard, fd))

    def _discard(self, fd: int, _events: int) -> None:
        try:
            size = os.splice(fd, self._null, _PIECE)
        except BlockingIOError:
            return
        if size == 0:
            self._close(fd)
        elif size >= _FLOOD:
            self._loop.unregister(fd)
            self._pipes[fd] = self._loop.call_later(_PAUSE_SECONDS, partial(self._watch, fd))

    def _close(self, fd: int) -> None:
        timer = self._pipes.pop(fd)
        if timer is not None:
            timer.cancel()
        self._loop.unregister(fd)
        os.close(fd)
