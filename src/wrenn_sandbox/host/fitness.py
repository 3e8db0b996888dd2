"""Whether this host can continue what is stored. Asked before anything is started."""

from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import IncompatibleImage, NoCapacity
from wrenn_sandbox.host import stored
from wrenn_sandbox.host.disk.growth import Layers
from wrenn_sandbox.host.images.compatibility import require
from wrenn_sandbox.host.images.manifest import Machine as Hardware
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.origin import Parts
from wrenn_sandbox.host.stored import StoredSandbox

_UNTIDY: Final = "What the sandbox has written is being put together; try again in a moment."
_UNTIDY_SEC: Final = 5.0


def hardware(parts: Parts, vcpus: int, memory_mb: int, image: Manifest) -> Hardware:
    """A machine over this image as this host would make it now; memory in MiB."""
    return parts.driver.machine(
        vcpus=vcpus,
        memory_mb=memory_mb,
        network=parts.network,
        kernel_sha256=started_as(image).kernel_sha256,
    )


def started_as(image: Manifest) -> Hardware:
    """The machine that continues this image: what is here by now can be another QEMU."""
    assert image.machine is not None
    return image.machine


def require_image(parts: Parts, image: Manifest) -> None:
    """Raise `IncompatibleImage` unless a new sandbox can start from the image's snapshot."""
    if image.machine is None or image.private:
        raise IncompatibleImage("The image is none that a machine can be started from.")
    require(image.machine, hardware(parts, image.vcpus, image.memory_mb, image))


def require_stored(parts: Parts, manifest: StoredSandbox, image: Manifest) -> None:
    """Raise `IncompatibleImage` unless the stored machine is as this host would make it."""
    machine = manifest.machine
    require(machine, hardware(parts, machine.vcpus, machine.memory_mb, image))


def require_bounded(parts: Parts, layers: Layers) -> None:
    """Raise `NoCapacity` while the disk layers take too much to add one more.

    Housekeeping looks at a sandbox after each attempt to resume it, and puts them together.
    """
    if not layers.may_start(parts.settings.disk_factor):
        raise NoCapacity(_UNTIDY, retry_after=_UNTIDY_SEC)


def require_disks(
    parts: Parts, manifest: StoredSandbox, image: Manifest, staged: Path | None = None
) -> None:
    """Raise `IncompatibleImage` unless each stored disk builds on the right one; blocks.

    `staged` holds the newest while it is not committed yet.
    """
    disk = parts.store.disk(image)
    stored.require_disks(parts.paths, manifest, disk, image.disk_format, staged)
