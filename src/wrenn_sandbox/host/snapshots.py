"""Making an image of a stopped machine: its memory whole, its disk as one layer. Blocks."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.disk import overlay
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.manifest import Machine as Hardware
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.machine import Parts
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.ids import ImageId

_CONVERT_SEC: Final = 600


@dataclass(frozen=True)
class Source:
    """A stopped machine: what it stored in `directory`, and what that builds on."""

    directory: Path
    spec: MachineSpec
    base: Manifest
    hardware: Hardware
    token: str


def publish(parts: Parts, source: Source, image_id: ImageId) -> Manifest:
    """Complete the image in the source's directory, make it durable and keep it.

    Raises OSError and `HostFailure`; the machine is not touched.
    """
    made, base = source.directory, source.base
    store = parts.store
    copy_sparse(store.memory(base), made / form.MEMORY)
    diff.merge(made, made / form.MEMORY)
    for name in (diff.PAGES, diff.INDEX):
        (made / name).unlink()
    cold = store.open(base.base_image_id) if base.base_image_id else base
    flatten(source.spec.files.overlay, store.disk(cold), cold.disk_format, made / form.DISK)
    overlay.set_backing(made / form.DISK, f"../{cold.image_id}/{form.DISK}")
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
    published = store.publish(made, manifest)
    store.hold(image_id)
    return published


def copy_sparse(source: Path, target: Path) -> None:
    """A copy that shares blocks where the file system can, and has holes where it can not."""
    _run(["cp", "--reflink=auto", "--sparse=always", "--", str(source), str(target)])
    target.chmod(0o600)


def flatten(layer: Path, base: Path, base_format: str, target: Path) -> None:
    """One qcow2 layer over `base`, which `layer` ends on, with all that the chain above it holds."""
    copy_sparse(layer, target)
    argv = ["qemu-img", "rebase", "-U", "-f", "qcow2", "-b", str(base), "-F", base_format]
    _run([*argv, str(target)])


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_CONVERT_SEC, check=False)
    except subprocess.TimeoutExpired as error:
        raise HostFailure("The image could not be made in time.", detail=str(error)) from error
    if done.returncode != 0:
        detail = done.stderr.decode("utf-8", "replace")[:2000]
        if "No space left" in detail:
            raise OSError(28, detail)
        raise HostFailure("The image could not be made.", detail=detail)
