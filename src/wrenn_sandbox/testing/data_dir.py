"""A data directory for a short time, with the images of another one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wrenn_sandbox.host.paths import Paths


@contextlib.contextmanager
def working_directory(data_dir: Path, purpose: str) -> Iterator[Path]:
    """A new data directory beside `data_dir`, removed in the end.

    Images and engines are immutable, so theirs are hard links: no time, no space, and whatever is
    done to the new directory, the other one keeps its own.
    """
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{data_dir.name}-{purpose}-", dir=data_dir.parent))
    try:
        source, target = Paths(data_dir), Paths(directory)
        target.prepare()
        for shared in (source.images, source.templates, source.engines):
            if shared.is_dir():
                shutil.copytree(
                    shared,
                    directory / shared.name,
                    symlinks=True,
                    copy_function=os.link,
                    dirs_exist_ok=True,
                )
        for note, link in (
            (source.probe_verdict, target.probe_verdict),
            (source.installed_engine, target.installed_engine),
        ):
            if note.exists():
                os.link(note, link)
        yield directory
    finally:
        shutil.rmtree(directory)
