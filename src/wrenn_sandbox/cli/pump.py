"""Standard input on its way into a sandbox, read by a thread while the main one writes output."""

import contextlib
import os
import select
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from typing import Final, Self

from wrenn_sandbox.client import ClientError, Size

_PIECE: Final = 64 * 1024
_JOIN_SEC: Final = 1.0


class InputPump:
    """While entered, passes what is read from the descriptor `source` to `send`.

    `on_end` is called at the end of the input, `on_resize` before any input and whenever the
    terminal has changed its size; only the main thread may enter where it is given.
    """

    def __init__(
        self,
        source: int,
        send: Callable[[bytes], None],
        on_end: Callable[[], None] | None = None,
        on_resize: Callable[[], None] | None = None,
    ) -> None:
        self._source = source
        self._send = send
        self._on_end = on_end
        self._on_resize = on_resize
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._stopping = False
        self._undo = contextlib.ExitStack()
        # It may be stuck in a send to a server that does not read: that must not keep us.
        self._thread = threading.Thread(target=self._run, name="input", daemon=True)

    def __enter__(self) -> Self:
        if self._on_resize is not None:
            self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(self._waker))
            before = signal.signal(signal.SIGWINCH, lambda *_: None)
            self._undo.callback(signal.signal, signal.SIGWINCH, before)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._undo.close()
        os.write(self._waker, b"\0")
        self._thread.join(_JOIN_SEC)
        if not self._thread.is_alive():
            os.close(self._wake)
            os.close(self._waker)

    def _run(self) -> None:
        # The main thread sees for itself that the server is gone.
        with contextlib.suppress(ClientError):
            if self._on_resize is not None:
                self._on_resize()
            while not self._stopping:
                ready, _, _ = select.select([self._source, self._wake], [], [])
                if self._wake in ready:
                    self._woken(os.read(self._wake, _PIECE))
                elif not self._pass_on():
                    return

    def _woken(self, signals: bytes) -> None:
        if signal.SIGWINCH in signals and self._on_resize is not None and not self._stopping:
            self._on_resize()

    def _pass_on(self) -> bool:
        try:
            data = os.read(self._source, _PIECE)
        except OSError:
            data = b""
        if data:
            self._send(data)
        elif self._on_end is not None:
            self._on_end()
        return bool(data)


@contextlib.contextmanager
def raw_mode(terminal: int) -> Iterator[None]:
    """Every key goes through as it is, Ctrl-C too; the terminal is as before in the end."""
    before = termios.tcgetattr(terminal)
    try:
        # what was typed already is kept
        tty.setraw(terminal, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def size_of(terminal: int) -> Size:
    """A terminal's size, 80 x 24 where it does not know it."""
    size = os.get_terminal_size(terminal)
    return Size(size.columns or 80, size.lines or 24)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, waiting where the reader is slow."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
