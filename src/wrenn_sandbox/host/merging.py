"""A memory image of one stored sandbox's own: its base with its pages put in. Blocks."""

import os
from collections.abc import Callable
from pathlib import Path

from wrenn_sandbox.host.images.manifest import HardwareProfile, Manifest
from wrenn_sandbox.ids import ImageId

from . import paused
from .context import HostContext
from .images import manifest as form
from .memory import diff, sparse
from .paused import PausedSandbox


def make(
    context: HostContext, manifest: PausedSandbox, image_id: ImageId, check: Callable[[], None]
) -> Manifest:
    """Publish the private image of a stored sandbox, to which nothing refers yet.

    What is stored is verified first: a damaged byte must not get a new digest. `check` is called
    now and then and gives up by raising. Raises OSError and `IncompatibleImage`.
    """
    store = context.store
    base = store.open(manifest.image_id)
    paused.check(context.paths, manifest)
    pages = context.paths.generation(manifest.sandbox_id, manifest.generation)
    with store.staging() as made:
        memory = made / form.MEMORY
        below = store.memory_below(base)
        _clone(below or store.memory(base), memory, check)
        if below is not None:
            diff.merge(store.directory(base.image_id), memory, check)
        diff.merge(pages, memory, check)
        check()
        private = describe(made, base, manifest.machine, image_id)
        check()
        return store.publish(made, private)


def describe(made: Path, base: Manifest, machine: HardwareProfile, image_id: ImageId) -> Manifest:
    """The manifest of a private image whose memory is in `made`, instead of that of `base`."""
    return Manifest(
        image_id=image_id,
        created_at=form.now(),
        name=base.name,
        recipe_sha256=base.recipe_sha256,
        files={form.MEMORY: form.describe(made / form.MEMORY)},
        kernel_args=base.kernel_args,
        vcpus=base.vcpus,
        memory_mb=base.memory_mb,
        disk_mb=base.disk_mb,
        base_image_id=base.base_image_id if base.private else base.image_id,
        private=True,
        machine=machine,
    )


def _clone(source: Path, target: Path, check: Callable[[], None]) -> None:
    made = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(made, "wb") as write, source.open("rb") as read:
        sparse.clone(read.fileno(), write.fileno(), source.stat().st_size, check)
