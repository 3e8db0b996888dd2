"""The root disk of a template that is made of an OCI image."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.images.build import Root, host_errors
from wrenn_sandbox.host.images.disk import GUEST_FILES
from wrenn_sandbox.host.images.staging import staging, sweep

from .layout import Image, add_layer
from .pull import Pull, require_room
from .reference import Reference
from .unpack import DamagedImage, make_disk

_LEFT: Final = ("etc/pip.conf",)
"""What only the product's own templates get."""


@contextmanager
def root_of(reference: Reference, pull: Pull) -> Iterator[Root]:
    """Fetches an image, for as long as a template is made of it.

    Raises NotFound, InvalidRequest, NoSpace or HostFailure; only whole layers are left then.
    Needs root. Blocks.
    """
    if os.geteuid() != 0:
        raise HostFailure("A template can be made of an image by root alone: it mounts the disk")
    paths = pull.paths
    with host_errors():
        paths.prepare()
        sweep(paths.cache)
        with staging(paths.cache) as work:
            layout = work / "layout"
            image = pull.fetch(reference, layout)
            files = {name: text for name, text in GUEST_FILES.items() if name not in _LEFT}
            add_layer(layout, image, files)

            def make(disk: Path, size_mb: int) -> None:
                _make(pull, image, layout, disk, size_mb)

            source = f"{reference.text}@{image.digest}"
            yield Root(image.digest, source, image.defaults, make)


def _make(pull: Pull, image: Image, layout: Path, disk: Path, size_mb: int) -> None:
    place = os.open(pull.paths.data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def watch() -> None:
        require_room(place, pull.reserve_mb)

    try:
        make_disk(layout, size_mb, disk, place=pull.paths.data_dir, watch=watch)
    except DamagedImage:
        pull.forget(image)
        raise
    finally:
        os.close(place)
