"""A data directory for a short time, with the images of another one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SHARED = "images"


@contextlib.contextmanager
def working_directory(data_dir: Path, purpose: str) -> Iterator[Path]:
    """A new data directory beside `data_dir`, removed in the end.

    Images are immutable, so theirs are hard links: no time, no space, and whatever is done to
    the new directory, the other one keeps its own.
    """
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"{data_dir.name}-{purpose}-", dir=data_dir.parent))
    try:
        path.chmod(0o711)
        shutil.copytree(data_dir / SHARED, path / SHARED, symlinks=True, copy_function=os.link)
        yield path
    finally:
        shutil.rmtree(path)
