"""A person at a terminal: starts a program on it, types, and looks at what it shows."""

import os
import re
import select
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from wrenn_sandbox.patience import patience

_PATIENCE_SEC = patience(20.0)


class Screen:
    """Runs `argv` on a terminal of its own until the end of the block."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        cols: int = 80,
        rows: int = 24,
    ) -> None:
        self._master, self._slave = os.openpty()
        self.resize(cols, rows)
        self.shown = b""
        """All that the program has written."""
        self._seen = 0
        # setsid makes the terminal the controlling one: signals of its keys and size need that
        self._process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *argv],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=dict(environment),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        os.close(self._master)
        os.close(self._slave)

    def kill(self) -> None:
        """End the program as `kill -9` does."""
        self._process.kill()
        self._process.wait()

    def type(self, keys: str | bytes) -> None:
        os.write(self._master, keys.encode() if isinstance(keys, str) else keys)

    def resize(self, cols: int, rows: int) -> None:
        termios.tcsetwinsize(self._master, (rows, cols))

    def mode(self) -> list[object]:
        """The terminal's settings."""
        return list(termios.tcgetattr(self._slave))

    def expect(self, pattern: str, patience: float = _PATIENCE_SEC) -> re.Match[bytes]:
        """Wait until the pattern is shown, after what an earlier call has found."""
        deadline = time.monotonic() + patience
        while True:
            found = re.compile(pattern.encode(), re.DOTALL).search(self.shown, self._seen)
            if found is not None:
                self._seen = found.end()
                return found
            assert self._read(deadline), f"{pattern!r} was not shown, but {self.shown!r}"

    def wait(self, patience: float = _PATIENCE_SEC) -> int:
        """The program's exit code, when it has ended and all that it wrote is in `shown`."""
        deadline = time.monotonic() + patience
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"it runs on, having shown {self.shown!r}"
            self._read(min(deadline, time.monotonic() + 0.05))
        while self._read(time.monotonic()):
            continue
        return self._process.returncode

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if ready:
            self.shown += os.read(self._master, 65536)
        return bool(ready)
