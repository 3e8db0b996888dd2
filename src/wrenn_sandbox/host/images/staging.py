"""Directories under construction, and locks between processes.

A staging directory lives beside its future place, so that a rename completes it, and is locked by
its maker: one that nobody locks is what a killed process left, and `sweep` removes it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A new locked directory in `parent`; whatever is left of it is removed in the end."""
    path, lock = _locked_directory(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def discard(path: Path) -> None:
    """Removes a finished directory so that a crash half way leaves nothing that looks finished."""
    trash = Path(tempfile.mkdtemp(prefix=TRASH_PREFIX, dir=path.parent))
    path.rename(trash / path.name)
    shutil.rmtree(trash)


def sweep(parent: Path) -> int:
    """Removes what killed processes left in `parent` and returns how many entries that were."""
    removed = 0
    for path in [*parent.glob(STAGING_PREFIX + "*"), *parent.glob(TRASH_PREFIX + "*")]:
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
        finally:
            os.close(lock)
    return removed


@contextlib.contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Waits for the lock of a file and holds it, against other threads and processes."""
    fd = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def take(source: Path, target: Path) -> None:
    """Make a file that a machine has written part of what is being made; raises OSError."""
    source.rename(target)
    if os.geteuid() == 0:
        os.chown(target, 0, 0)


def sync_file(path: Path) -> None:
    """Make the content of a file durable; raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
