"""Results of build steps, kept by the digest of what they were made from."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from wrenn_sandbox.host.paths import sync_directory

from .staging import discard, staging, sync_file

_KEPT_PER_STEP = 3
_KEPT_SECONDS = 3600.0


class StepCache:
    """Directories `<step>-<digest>`, complete or absent. Safe between threads and processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(
        self, step: str, inputs: tuple[str, ...], make: Callable[[Path], None]
    ) -> tuple[Path, bool]:
        """The step's directory for these inputs, and whether it was there already.

        `make` fills an empty directory when it was not; what it raises is passed on and leaves
        nothing behind.
        """
        digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:32]
        target = self._directory / f"{step}-{digest}"
        if target.is_dir():
            os.utime(target)
            return target, True
        with staging(self._directory) as made:
            make(made)
            for path in made.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    sync_file(path)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
        sync_directory(self._directory)
        self._prune(step)
        return target, False

    def _prune(self, step: str) -> None:
        entries = sorted(
            self._directory.glob(step + "-*"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        for path in entries[_KEPT_PER_STEP:]:
            if path.stat().st_mtime < time.time() - _KEPT_SECONDS:
                discard(path)
