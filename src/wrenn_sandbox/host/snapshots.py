"""Making an image of a stopped machine: its memory whole, its disk as one layer. Blocks."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.images.manifest import HardwareProfile, Manifest
from wrenn_sandbox.host.images.store import disk_beside
from wrenn_sandbox.ids import ImageId
from wrenn_sandbox.patience import patience

from . import failpoints
from .context import HostContext
from .images import manifest as form
from .memory import diff

_CONVERT_SEC: Final = 600


@dataclass(frozen=True)
class Source:
    """A stopped machine: what it stored in `directory`, and what that builds on."""

    directory: Path
    disks: tuple[Path, ...]
    """The sandbox's own disk layers over the base's, oldest first."""
    base: Manifest
    hardware: HardwareProfile
    token: str


def publish(context: HostContext, source: Source, image_id: ImageId) -> Manifest:
    """Complete the image in the source's directory, make it durable and keep it.

    Raises OSError and `HostFailure`; no image is left then. The machine is not touched.
    """
    context.store.hold(image_id)
    failpoints.reach("snapshot.held")
    try:
        return _publish(context, source, image_id)
    except BaseException:
        context.store.let_go(image_id)
        raise


def _publish(context: HostContext, source: Source, image_id: ImageId) -> Manifest:
    made, base = source.directory, source.base
    store = context.store
    copy_sparse(store.memory(base), made / form.MEMORY)
    diff.merge(made, made / form.MEMORY)
    for name in (diff.PAGES, diff.INDEX):
        (made / name).unlink()
    failpoints.reach("snapshot.memory")
    cold = store.cold(base)
    context.driver.disk_format.merge(
        (store.disk(base), *source.disks), made / form.DISK, disk_beside(cold), base.disk_size
    )
    failpoints.reach("snapshot.disk")
    names = (form.VMSTATE, form.MEMORY, form.DISK)
    manifest = Manifest(
        image_id=image_id,
        created_at=form.now(),
        name=base.name,
        recipe_sha256=base.recipe_sha256,
        files={name: form.describe(made / name) for name in names},
        kernel_args=base.kernel_args,
        vcpus=source.hardware.vcpus,
        memory_mb=source.hardware.memory_mb,
        disk_mb=base.disk_mb,
        base_image_id=cold.image_id,
        token=source.token,
        machine=source.hardware,
    )
    return store.publish(made, manifest)


def copy_sparse(source: Path, target: Path) -> None:
    """A copy that shares blocks where the file system can, and has holes where it cannot."""
    _run(["cp", "--reflink=auto", "--sparse=always", "--", str(source), str(target)])
    target.chmod(0o600)


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=patience(_CONVERT_SEC), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise HostFailure("The image could not be made in time", detail=str(error)) from error
    if done.returncode != 0:
        detail = done.stderr.decode("utf-8", "replace")[:2000]
        if "No space left" in detail:
            raise OSError(28, detail)
        raise HostFailure("The image could not be made", detail=detail)
