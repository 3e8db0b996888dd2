"""The lock of the one server that uses a data directory."""

import fcntl
import os
from pathlib import Path


class DirectoryLock:
    """Held by the open file, so the kernel frees it whenever and however the holder ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self) -> bool:
        """Take the lock; False where another process has it."""
        fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Give the lock back; safe to repeat."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
