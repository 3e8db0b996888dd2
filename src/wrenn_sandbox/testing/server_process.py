"""`wrenn serve` as a child process, for the demo, the tests and the measurements."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.patience import patience

from .leftovers import leftovers, machines

_READY = "Wrenn is ready at "
_TAIL_LINES = 20
_TAIL_COLUMNS = 1000
_NOT_ITS_OWN = frozenset({"DATABASE_URL", "WRENN_TLS_CERT", "WRENN_TLS_KEY"})
"""What this process's environment says of another server: its database, and its names."""


class ServerProcess:
    """A server of its own on a free loopback port; ended when the `with` block ends.

    `overrides` are environment variables on top of this process's own, of which it gets neither
    database nor certificate. Everything the server logs is in `log`, which several lives may share.
    """

    def __init__(self, data_dir: Path, log: Path, overrides: Mapping[str, str] = {}) -> None:
        self.log = log
        self.url = ""
        self._data_dir = data_dir
        inherited = {k: v for k, v in os.environ.items() if k.upper() not in _NOT_ITS_OWN}
        self._environment = {
            **inherited,
            "WRENN_HOST": "127.0.0.1",
            "WRENN_PORT": "0",
            "WRENN_LOG_FORMAT": "json",
            **overrides,
            "WRENN_DATA_DIR": str(data_dir),
        }
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether it was started and not yet ended by us."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The server's process id; `HostFailure` when it is not running."""
        if self._process is None:
            raise HostFailure("The server is not running")
        return self._process.pid

    def set(self, **variables: str) -> None:
        """Change environment variables of its next life."""
        self._environment |= variables

    def start(self, timeout: float = 60.0) -> None:
        """Start it and wait until it says where it answers.

        `HostFailure` with the end of the log as its detail when it does not within `timeout`
        seconds, more of them on a slow machine.
        """
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wrenn_sandbox", "serve"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        line = self._first_line(self._process, timeout)
        if not line.startswith(_READY):
            self.kill()
            raise HostFailure("The server did not start", detail=self.tail())
        self.url = line.removeprefix(_READY).strip()

    def stop(self, timeout: float = 30.0) -> int:
        """Ask it to stop, as Ctrl-C does, and kill it when it does not; returns its exit code."""
        return self._end(signal.SIGTERM, timeout)

    def kill(self) -> int:
        """End it as `kill -9` does; its machines live on."""
        return self._end(signal.SIGKILL, timeout=10.0)

    def purge(self) -> None:
        """End it with every machine it has, and have what they leave reclaimed."""
        self.stop()
        for pid in machines(self._data_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if leftovers(self._data_dir):
            self.start()
            self.stop()

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line[:_TAIL_COLUMNS] for line in lines[-_TAIL_LINES:])

    @staticmethod
    def _first_line(process: subprocess.Popen[str], timeout: float) -> str:
        """The first line on its standard output, or nothing when it ends or takes too long."""
        assert process.stdout is not None
        deadline = time.monotonic() + patience(timeout)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return ""
        return process.stdout.readline()

    def _end(self, number: signal.Signals, timeout: float) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(patience(timeout))
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            if process.stdout is not None:
                process.stdout.close()
