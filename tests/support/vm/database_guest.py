"""A program for a guest: databases that are written to, and what is true of them at any time.

`start DIRECTORY` starts PostgreSQL on that directory of its root and waits until it answers.
`write KIND` makes a database of that kind and adds rows until it is killed; `crash` kills all that
writes. `check KIND [DIRECTORY]` prints up to which row the writer had been told that they are
committed, and how many there are. A database that is not whole is an error.
"""

import hashlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time

ROOT = "/srv/postgres"
"""PostgreSQL's programs and libraries; its data is in `data` there."""
_SETTINGS = (
    "listen_addresses=",
    "dynamic_shared_memory_type=mmap",
    "shared_buffers=16MB",
    "max_connections=20",
    "checkpoint_timeout=30s",
)
_TABLES = """
CREATE TABLE rows (n INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE total (last INTEGER NOT NULL);
INSERT INTO total VALUES (0);
"""
_WHOLE = """
SELECT count(*) = max(n) AND min(n) = 1 AND count(*) % 2 = 0 AND count(*) =
       (SELECT last FROM total) AND sum(CASE WHEN md5(body) = digest THEN 0 ELSE 1 END) = 0,
       count(*) FROM rows
"""
_PAUSE_SEC = 0.01


def _chroot(program: str, *arguments: str) -> list[str]:
    (path,) = (
        os.path.join(directory, program)
        for directory, _, names in os.walk(f"{ROOT}/usr/lib/postgresql")
        if program in names
    )
    nobody = ("--userspec=+65534:+65534", "--groups=")  # by number: that root has no names
    return ["chroot", *nobody, ROOT, path.removeprefix(ROOT), *arguments]


def _psql(directory: str, *options: str) -> list[str]:
    plain = ("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1")
    return _chroot("psql", *plain, "-h", f"/{directory}", "-U", "wrenn", "postgres", *options)


def start(directory: str) -> None:
    options = [part for setting in _SETTINGS for part in ("-c", setting)]
    said = f"/root/{directory}.log"
    with open(said, "ab") as log:
        server = subprocess.Popen(
            _chroot("postgres", "-D", f"/{directory}", "-k", f"/{directory}", *options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while subprocess.run(_psql(directory, "-c", ""), capture_output=True, check=False).returncode:
        if server.poll() is not None:
            with open(said, encoding="utf-8") as file:
                sys.exit(file.read())
        time.sleep(0.1)


class _Sqlite:
    def __init__(self, directory: str = "root") -> None:
        self._database = sqlite3.connect(f"/{directory}/db", isolation_level=None, timeout=60)
        self._database.create_function("md5", 1, _md5, deterministic=True)

    def make(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_TABLES)

    def run(self, transaction: str) -> None:
        self._database.executescript(transaction)

    def counted(self) -> str:
        [(found,)] = self._database.execute("PRAGMA integrity_check")
        assert found == "ok", found
        [(whole, count)] = self._database.execute(_WHOLE)
        return f"{'t' if whole else 'f'}|{count}"


class _Postgres:
    """One session for as long as this program lives."""

    def __init__(self, directory: str = "data") -> None:
        self._psql = subprocess.Popen(
            _psql(directory), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def make(self) -> None:
        self.run(_TABLES)

    def run(self, transaction: str) -> None:
        assert self._asked(f"{transaction}; SELECT 'done'") == "done"

    def counted(self) -> str:
        return self._asked(_WHOLE)

    def _asked(self, script: str) -> str:
        assert self._psql.stdin is not None
        assert self._psql.stdout is not None
        self._psql.stdin.write(f"{script};\n")
        self._psql.stdin.flush()
        return self._psql.stdout.readline().strip()


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def _insert(number: int) -> str:
    body = f"{number} " * (number % 300)
    return f"INSERT INTO rows VALUES ({number}, '{body}', '{_md5(body)}')"


def write(kind: str) -> None:
    """The database is the writer's alone: SQLite must not be taken over a fork."""
    told = f"/run/{kind}.told"
    if os.fork():
        while not os.path.exists(told):
            time.sleep(0.1)
        return
    os.setsid()
    with open(f"/run/{kind}.pid", "w", encoding="ascii") as file:
        file.write(str(os.getpid()))
    database = _KINDS[kind]()
    database.make()
    fd = os.open(told, os.O_CREAT | os.O_WRONLY)
    for last in itertools.count(2, 2):
        total = f"UPDATE total SET last = {last}"
        database.run("; ".join(("BEGIN", _insert(last - 1), _insert(last), total, "COMMIT")))
        os.pwrite(fd, b"%20d" % last, 0)
        time.sleep(_PAUSE_SEC)


def check(kind: str, *directory: str) -> None:
    with open(f"/run/{kind}.told", encoding="ascii") as file:
        told = int(file.read() or 0)
    whole, count = _KINDS[kind](*directory).counted().split("|")
    assert whole == "t", f"{count} rows"
    print(told, count)


def crash() -> None:
    """What was not written to the disk is, and is read from there again."""
    for kind in _KINDS:
        with open(f"/run/{kind}.pid", encoding="ascii") as file:
            os.kill(int(file.read()), signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "-u", "nobody"], check=True)
    while subprocess.run(["pgrep", "-u", "nobody"], capture_output=True, check=False).stdout:
        time.sleep(0.1)
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


_KINDS: dict[str, type[_Sqlite | _Postgres]] = {"sqlite": _Sqlite, "postgres": _Postgres}

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["start", where]:
            start(where)
        case ["write", which]:
            write(which)
        case ["check", which, *place]:
            check(which, *place)
        case ["crash"]:
            crash()
