"""Making an image of a machine: its own pages over another image's memory, its disk as one layer.

All calls block. Memory is not copied. Where the machine's image is itself no more than pages over
another one, the new image is over that as well: such images never build on each other.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.images.manifest import FileDigest, HardwareProfile, Manifest
from wrenn_sandbox.host.images.store import disk_beside
from wrenn_sandbox.ids import ImageId

from . import failpoints
from .context import HostContext
from .images import manifest as form
from .memory import diff
from .memory.pages import PAGE
from .memory.sparse import go_on

_OWN: Final = "own"


@dataclass(frozen=True)
class Source:
    """What was stored of a machine in `directory`: the `files` with their digests.

    `disks` are the sandbox's own disk layers over the base's, oldest first.
    """

    directory: Path
    files: Mapping[str, FileDigest]
    disks: tuple[Path, ...]
    base: Manifest
    hardware: HardwareProfile
    token: str


def publish(context: HostContext, source: Source, image_id: ImageId) -> Manifest:
    """Complete the image in the source's directory, make it durable and keep it.

    Raises OSError and `IncompatibleImage`; no image is left then. The machine is not touched.
    """
    context.store.hold(image_id)
    failpoints.reach("snapshot.held")
    try:
        return _publish(context, source, image_id)
    except BaseException:
        context.store.let_go(image_id)
        raise


def _publish(context: HostContext, source: Source, image_id: ImageId) -> Manifest:
    made, base, store = source.directory, source.base, context.store
    files = dict(source.files)
    if base.memory_base_id is not None:
        files |= _combine(made, store.directory(base.image_id), source.hardware.memory_mb)
    failpoints.reach("snapshot.memory")
    cold = store.cold(base)
    if not (made / form.DISK).exists():
        merge_disks(context, source.disks, base, made)
    files[form.DISK] = form.describe(made / form.DISK)
    failpoints.reach("snapshot.disk")
    manifest = Manifest(
        image_id=image_id,
        created_at=form.now(),
        name=base.name,
        recipe_sha256=base.recipe_sha256,
        files=files,
        kernel_args=base.kernel_args,
        vcpus=source.hardware.vcpus,
        memory_mb=source.hardware.memory_mb,
        disk_mb=base.disk_mb,
        base_image_id=cold.image_id,
        memory_base_id=base.memory_base_id or base.image_id,
        token=source.token,
        machine=source.hardware,
    )
    return store.publish(made, manifest)


def merge_disks(
    context: HostContext,
    disks: tuple[Path, ...],
    base: Manifest,
    made: Path,
    check: Callable[[], None] = go_on,
) -> None:
    """Write the image's disk: all layers in one.

    Raises OSError, `IncompatibleImage`, and what `check` raises, which is called now and then.
    """
    store, target = context.store, made / form.DISK
    below = disk_beside(store.cold(base))
    chain = (store.disk(base), *disks)
    context.driver.disk_format.merge(chain, target, below, base.disk_size, check)


def _combine(made: Path, older: Path, memory_mb: int) -> Mapping[str, FileDigest]:
    """Add to the pages in `made` those that the image below has."""
    newer = made / _OWN
    newer.mkdir()
    for name in (diff.INDEX, diff.PAGES):
        (made / name).rename(newer / name)
    found = diff.combine(newer, older, (memory_mb << 20) // PAGE, made)
    shutil.rmtree(newer)
    return found
