# Made by tools/make_sync_client.py from _async/streams.py: change that file.
"""A command being followed while it runs, and a terminal."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.sync.client import ClientConnection

from wrenn_sandbox.client import frames
from wrenn_sandbox.client.bounded import cut, receive, send
from wrenn_sandbox.client.errors import ClientError, ConnectionFailed, ExecTimeout
from wrenn_sandbox.client.frames import Exit, Frame, Size, Started, Stdout
from wrenn_sandbox.client.transport import (
    MESSAGE_LIMIT_BYTES,
    QUIET_SEC,
    SEND_SEC,
    STOP_SEC,
    websocket_failures,
)

from .api import Api


class _Channel:
    """Messages both ways, until the server has sent the last one."""

    _encoding = "utf-8"

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._early: Frame | None = None
        self._arrived: deque[str | bytes] = deque()
        self._limit: float | None = None
        self._deadline: float | None = None
        self._begun = False
        self._stopped = False
        self.pid: int | None = None
        """Process id in the sandbox; None for a command that could not be started."""
        self.tag: str | None = None
        self.exit_code: int | None = None
        """Set when all that the command wrote has been read."""

    def resize(self, cols: int, rows: int) -> None:
        """Tell the command of its terminal's new size in characters."""
        self._send(frames.resize(Size(cols, rows)))

    def _begin(self, message: str | None, deadline: float, limit: float | None) -> None:
        """The first messages both ways, before `deadline`, a time of the monotonic clock.

        `limit` is the command's, in seconds, where that is what ends then.
        """
        self._deadline, self._limit = deadline, limit
        if message is not None:
            self._send(message)
        first = self._next()
        self._begun = True
        if limit is None:
            self._deadline = None
        if isinstance(first, Started):
            self.pid, self.tag = first.pid, first.tag
        else:
            self._early = first

    def _send(self, message: str | bytes) -> None:
        """What is sent after the end is lost, as it is with a process that has ended."""
        with websocket_failures():
            try:
                self._connection.send(message)
            except ConnectionClosedOK:
                return

    def _frames(self) -> Iterator[Frame]:
        while self.exit_code is None:
            frame = self._early or self._next()
            self._early = None
            if isinstance(frame, Exit):
                if self._stopped:
                    raise self._timeout(f"did not end within {self._limit:g} s and was stopped")
                self.exit_code = frame.exit_code
            if not isinstance(frame, Started):
                yield frame

    def _next(self) -> Frame | Started:
        while True:
            try:
                with websocket_failures():
                    message = self._receive()
            except ConnectionFailed as error:
                if self._stopped:
                    raise self._unknown() from error
                raise ConnectionFailed(f"the stream ended before the command: {error}") from error
            frame = self._parsed(message)
            if isinstance(frame, ClientError):
                raise frame
            if frame is not None:
                return frame

    def _parsed(self, message: str | bytes) -> Frame | Started | ClientError | None:
        if isinstance(message, bytes) and self._connection.subprotocol is not None:
            return Stdout(message)
        return frames.parse(message, self._encoding)

    def _receive(self) -> str | bytes:
        while not self._arrived:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                self._run_out()
                continue
            try:
                return receive(self._connection, left)
            except TimeoutError:
                continue
        return self._arrived.popleft()

    def _run_out(self) -> None:
        """The time is over: tell the command to end, and wait once more, or leave it.

        Neither where the end has arrived already and was not read, as its reader is slow.
        """
        if self._read_ahead():
            self._deadline = None
            return
        if self._arrived and not self._begun:
            return
        if self._begun and not self._stopped:
            self._stopped = True
            self._deadline = time.monotonic() + STOP_SEC
            if send(self._connection, frames.signal("stop"), SEND_SEC):
                return
        cut(self._connection)
        if self._limit is None:
            raise ConnectionFailed("the sandbox did not respond in time")
        if self._begun:
            raise self._unknown()
        raise self._timeout(f"was not started within {self._limit:g} s: no response")

    def _read_ahead(self) -> bool:
        """Take what has arrived, for a second at most; whether the end is in it."""
        until, size = time.monotonic() + SEND_SEC, 0
        while size < MESSAGE_LIMIT_BYTES and time.monotonic() < until:
            try:
                message = receive(self._connection, QUIET_SEC)
            except TimeoutError:
                return False
            except ConnectionClosed:
                return True
            self._arrived.append(message)
            if isinstance(self._parsed(message), Exit | ClientError):
                return True
            size += len(message)
        return False

    def _unknown(self) -> ExecTimeout:
        return self._timeout(
            f"did not end within {self._limit:g} s, and it is not known whether it was stopped"
        )

    def _timeout(self, what: str) -> ExecTimeout:
        return ExecTimeout("exec_timeout", f"The command {what}", status=0)


class Stream(_Channel):
    """A running command: iterate for what it writes, in order; the last frame is `Exit`.

    A reader that is slow slows the command down. Leaving the block before the end ends the
    command, unless the stream was attached to it.
    """

    def __iter__(self) -> Iterator[Frame]:
        return self._frames()

    def send(self, data: bytes | str) -> None:
        """Write to the command's standard input."""
        for message in frames.stdin(data.encode() if isinstance(data, str) else data):
            self._send(message)

    def close_stdin(self) -> None:
        """Say that no more input comes."""
        self._send(frames.signal("stdin_close"))

    def stop(self) -> None:
        """End the command: SIGTERM, after five seconds SIGKILL. Its last output still comes."""
        self._send(frames.signal("stop"))

    def expire(self) -> None:
        """Stop the command, whose time limit is over, unless its end has arrived.

        Reading does this by itself. It is for a reader that is busy with what it has read, and is
        never called while one reads.
        """
        if self._deadline is not None and not self._stopped and self.exit_code is None:
            self._run_out()

    def wait(self) -> int:
        """Read to the end, give up the output, and return the exit code."""
        for _ in self:
            continue
        assert self.exit_code is not None
        return self.exit_code


class Terminal(_Channel):
    """A terminal in a sandbox: iterate for the bytes it shows; then `exit_code` is set.

    It outlives its connection: connect to it again by its `tag`.
    """

    _encoding = "base64"

    def __iter__(self) -> Iterator[bytes]:
        for frame in self._frames():
            if not isinstance(frame, Exit):
                yield frame.data

    def send(self, data: bytes | str) -> None:
        """Type."""
        typed = data.encode() if isinstance(data, str) else data
        binary = self._connection.subprotocol is not None
        for message in frames.terminal_input(typed, binary=binary):
            self._send(message)

    def kill(self) -> None:
        """End what runs in it."""
        self._send(frames.signal("kill"))


@contextlib.contextmanager
def open_stream(
    api: Api, path: str, start: str | None = None, limit: float | None = None
) -> Iterator[Stream]:
    """A stream that was begun with the message `start`, where it needs one.

    `limit` is the command's in seconds, from now on.
    """
    wait = api.timeout if limit is None else limit
    deadline = time.monotonic() + wait
    with api.websocket(path, wait) as connection:
        stream = Stream(connection)
        stream._begin(start, deadline, limit)
        yield stream


@contextlib.contextmanager
def open_terminal(api: Api, path: str, start: str) -> Iterator[Terminal]:
    """A terminal that was begun or found with the message `start`, open while the block lasts."""
    with api.websocket(path, api.timeout, frames.TERMINAL_SUBPROTOCOL) as connection:
        terminal = Terminal(connection)
        terminal._begin(start, time.monotonic() + api.timeout, None)
        yield terminal
