"""One running command: its output, input, terminal and end."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import termios
import time
from functools import partial

from .drain import Drain
from .errors import FailedPrecondition, InvalidArgument, NotFound, from_os_error
from .loop import Loop, Notice, Timer
from .output import Budget, OutputLog
from .spawn import Command, Spawned, resize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ_SIZE = 64 * 1024
LINGER_SECONDS = 0.5
"""How long a pipe that a grandchild keeps open may delay the end of a command.

Then it is drained.
"""

_READABLE = select.EPOLLIN
_LAST_WRITER_GONE = select.EPOLLHUP


class Process:
    """A started command. It has `ended` once it exited and all of its output is in `output`."""

    def __init__(
        self,
        loop: Loop,
        budget: Budget,
        command: Command,
        tag: str,
        spawned: Spawned,
        started: float,
        drain: Drain,
        on_end: Callable[[Process], None],
    ) -> None:
        self._loop = loop
        self._drain = drain
        self._on_end = on_end
        self._started = started
        self._channels = spawned.outputs
        self._leftover: dict[int, int] = {}
        """Bytes still to be read from pipes that are drained after that."""
        self._paused = False
        self._input = spawned.input
        self._writing = False
        self._input_free = Notice(loop)
        self.pid = spawned.pid
        self.group = spawned.group
        self.command = command
        self.tag = tag
        self.output = OutputLog(loop, budget)
        self.status: int | None = None
        """Wait status, None while running."""
        self.duration = 0.0
        """Seconds from start to exit."""
        self.ended = False
        self._lingering: Timer | None = None
        self._watch_outputs()

    @property
    def has_terminal(self) -> bool:
        """Whether it runs on a PTY."""
        return self.command.size is not None

    def exited(self, status: int) -> None:
        """The process was reaped with this wait status."""
        self.status = status
        self.duration = time.monotonic() - self._started
        self._input_free.notify()
        if self._channels:
            self._lingering = self._loop.call_later(LINGER_SECONDS, self._stop_lingering)
        self._end_if_complete()

    def ended_before(self, seconds: float) -> bool:
        """Whether it has ended, longer than that ago."""
        ended = self._started + self.duration
        return self.ended and time.monotonic() - ended > seconds

    def signal_group(self, number: int) -> None:
        """Send a signal to the whole process group; raises NotFound when it is gone."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError as error:
            raise NotFound(f"process {self.pid} does not exist") from error
        except PermissionError as error:
            raise from_os_error(error, f"cannot signal process {self.pid}") from error

    def resume(self) -> None:
        """Read on if the readers have caught up."""
        if self._paused and not self.output.full:
            self._paused = False
            self._watch_outputs()

    def resize(self, size: tuple[int, int]) -> None:
        """Change the size of the terminal."""
        if not self.has_terminal:
            raise FailedPrecondition("process has no terminal")
        for fd in self._channels:
            resize(fd, size)

    async def write_input(self, data: bytes) -> None:
        """Write all of `data` to stdin or the terminal, waiting for the process to read it."""
        while self._writing:
            await self._input_free.wait()
        self._writing = True
        try:
            while data:
                data = data[await self._write_some(data) :]
        finally:
            self._writing = False
            self._input_free.notify()

    async def close_input(self) -> None:
        """Close stdin after everything written so far; closing twice is fine."""
        if self.has_terminal:
            raise FailedPrecondition("a terminal has no stdin to close: send Ctrl+D")
        while self._writing:
            await self._input_free.wait()
        self._close_input()

    def check_input(self, terminal: bool) -> None:
        """Raise unless the process takes the kind of input that a caller wants to send."""
        if terminal != self.has_terminal:
            raise InvalidArgument("use `pty` input with a terminal, `stdin` without")

    async def _write_some(self, data: bytes) -> int:
        fd = self._input
        if self.status is not None:
            raise NotFound(f"process {self.pid} has ended")
        if fd is None:
            raise FailedPrecondition("stdin of the process is closed")
        try:
            return os.write(fd, data[:READ_SIZE])
        except BlockingIOError:
            await self._input_writable(fd)
            return 0
        except OSError as error:
            raise FailedPrecondition("stdin of the process is closed") from error

    async def _input_writable(self, fd: int) -> None:
        # a terminal's descriptor is registered for its output already: watch a copy
        watched = os.dup(fd)
        self._loop.register(watched, select.EPOLLOUT, lambda _events: self._input_free.notify())
        try:
            await self._input_free.wait()
        finally:
            self._loop.unregister(watched)
            os.close(watched)

    def _close_input(self) -> None:
        if self._input is not None and not self.has_terminal:
            os.close(self._input)
        self._input = None

    def _watch_outputs(self) -> None:
        for fd in self._channels:
            self._loop.register(fd, _READABLE, partial(self._on_readable, fd))

    def _on_readable(self, fd: int, events: int) -> None:
        while fd in self._channels:
            if self.output.full:
                self._pause()
                return
            try:
                data = os.read(fd, READ_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EIO:  # a terminal that nobody has open any more
                    raise
                data = b""
            if data:
                self.output.append(self._channels[fd], data)
            self._after_read(fd, len(data))
            if not events & _LAST_WRITER_GONE:
                return

    def _after_read(self, fd: int, size: int) -> None:
        if fd in self._leftover:
            self._leftover[fd] -= size
        if size == 0:
            self._close_output(fd)
            self._end_if_complete()
        elif self._leftover.get(fd, 1) <= 0:
            self._drain_output(fd)
            self._end_if_complete()

    def _pause(self) -> None:
        self._paused = True
        for fd in self._channels:
            self._loop.unregister(fd)

    def _stop_lingering(self) -> None:
        for fd in list(self._channels):
            (left,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))
            if left:
                self._leftover[fd] = left
            else:
                self._drain_output(fd)
        self._end_if_complete()

    def _drain_output(self, fd: int) -> None:
        if self.has_terminal:
            self._close_output(fd)
            return
        del self._channels[fd]
        self._loop.unregister(fd)
        self._drain.add(fd)

    def _close_output(self, fd: int) -> None:
        del self._channels[fd]
        self._loop.unregister(fd)
        os.close(fd)
        if fd == self._input:
            self._input = None

    def _end_if_complete(self) -> None:
        if self.status is not None and not self._channels and not self.ended:
            self.ended = True
            if self._lingering is not None:
                self._lingering.cancel()
            self._close_input()
            self._input_free.notify()
            self._on_end(self)
            self.output.changed.notify()
