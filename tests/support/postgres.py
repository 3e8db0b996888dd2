"""A PostgreSQL server of the tests' own, in a directory of its own, ended with the test run."""

import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

_SETTINGS = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "listen_addresses=",
    "max_connections=100",
    "shared_buffers=32MB",
)
_READY = b"database system is ready to accept connections"


def programs() -> Path:
    """The directory of the newest PostgreSQL that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        raise RuntimeError("Install the package postgresql: the tests run a server of their own")
    return found[-1]


def _as_nobody() -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return ["setpriv", "--pdeathsig", "KILL"]
    return [
        "setpriv",
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        "--pdeathsig",
        "KILL",
    ]


def make_data(data: Path, *options: str) -> None:
    """Make an empty cluster, as a directory of nobody's below one of nobody's."""
    subprocess.run(
        [
            *_as_nobody(),
            programs() / "initdb",
            "--no-sync",
            "--auth=trust",
            "--username=wrenn",
            "--encoding=UTF8",
            "--locale=C",
            *options,
            data,
        ],
        check=True,
        capture_output=True,
        cwd=data.parent,
        env={**os.environ, "TZ": "GMT"},
    )


@dataclass
class PostgresServer:
    """A running server, reached through a socket in `directory`."""

    directory: Path
    process: "subprocess.Popen[bytes]"
    databases: int = 0
    reader: threading.Thread | None = None

    @classmethod
    def start(cls) -> Self:
        directory = Path(mkdtemp(prefix="wrenn-pg-"))
        if os.geteuid() == 0:
            shutil.chown(directory, "nobody", "nogroup")
        data = directory / "data"
        make_data(data)
        options = [part for setting in _SETTINGS for part in ("-c", setting)]
        process = subprocess.Popen(
            [*_as_nobody(), programs() / "postgres", "-D", data, "-k", directory, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=directory,
        )
        server = cls(directory, process)
        server._wait_until_ready()
        return server

    def _wait_until_ready(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        lines = []
        for line in stream:
            lines.append(line)
            if _READY in line:
                self.reader = threading.Thread(target=deque, args=(stream, 0), daemon=True)
                self.reader.start()
                return
        raise RuntimeError(b"".join(lines).decode())

    def make_database(self, template: str = "template1") -> str:
        """The name of a new database, a copy of `template`."""
        self.databases += 1
        name = f"test{self.databases}"
        subprocess.run(
            [
                programs() / "psql",
                *("-h", self.directory, "-U", "wrenn", "-d", "postgres", "-q"),
                *("-c", f"CREATE DATABASE {name} TEMPLATE {template}"),
            ],
            check=True,
        )
        return name

    def url(self, database: str) -> str:
        return f"postgresql://wrenn@/{database}?host={self.directory}"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()
        assert self.reader is not None
        assert self.process.stderr is not None
        self.reader.join()
        self.process.stderr.close()
        shutil.rmtree(self.directory)
