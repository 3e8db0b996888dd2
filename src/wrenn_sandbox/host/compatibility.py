"""Whether this host can continue what is stored. Asked before anything is started."""

from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.errors import IncompatibleImage, NoCapacity
from wrenn_sandbox.host.images.manifest import HardwareProfile, Manifest

from . import paused
from .context import HostContext
from .disk_use import Layers
from .engines import NAMES, retirement
from .paused import PausedSandbox

_UNTIDY: Final = "The sandbox's disk layers are being merged; try again in a moment"
_UNTIDY_SEC: Final = 5.0


def hardware(context: HostContext, vcpus: int, memory_mb: int, image: Manifest) -> HardwareProfile:
    """A machine over this image as this host would make it now; memory in MiB."""
    return profile(context, vcpus, memory_mb, started_as(image).kernel_sha256)


def profile(
    context: HostContext, vcpus: int, memory_mb: int, kernel_sha256: str
) -> HardwareProfile:
    """What a snapshot of such a machine needs to be restored here; memory in MiB."""
    driver = context.driver.capabilities
    return HardwareProfile(
        vcpus=vcpus,
        memory_mb=memory_mb,
        cpu_model=driver.cpu_model,
        accelerator=driver.accelerator,
        vmm=driver.name,
        vmm_version=driver.version,
        network=context.network,
        kernel_sha256=kernel_sha256,
        firmware=driver.firmware,
        tsc_khz=driver.tsc_khz,
        engine=driver.engine,
    )


def started_as(image: Manifest) -> HardwareProfile:
    """The machine that continues this image: the VMM that is here by now can be another."""
    assert image.machine is not None
    return image.machine


def require_image(context: HostContext, image: Manifest) -> str:
    """Raise `IncompatibleImage` unless a new sandbox can start from the image's snapshot.

    Returns the digest of the engine that it is started with.
    """
    if image.machine is None or image.private:
        raise IncompatibleImage("This image has no snapshot to start from")
    here = hardware(context, image.vcpus, image.memory_mb, image)
    return require(context, image.machine, here)


def require_stored(context: HostContext, manifest: PausedSandbox, image: Manifest) -> str:
    """Raise `IncompatibleImage` unless the stored machine is as this host would make it.

    Returns the digest of the engine that it goes on with.
    """
    machine = manifest.machine
    here = hardware(context, machine.vcpus, machine.memory_mb, image)
    return require(context, machine, here)


def retired(context: HostContext, machine: HardwareProfile) -> str:
    """Why a stored machine cannot go on for good: its engine is retired. Else empty. Blocks."""
    try:
        engine = context.engines.of(machine)
    except IncompatibleImage:
        return ""
    return "" if engine is None or engine.retired_at is None else retirement(engine)


def require_driver(context: HostContext, machine: HardwareProfile) -> None:
    """Raise `IncompatibleImage` unless a machine was stored with the driver of this host.

    With another one not even its disk can be used: it is in another format.
    """
    here = context.driver.capabilities.name
    if machine.vmm != here:
        before, now = (NAMES.get(each, each) for each in (machine.vmm, here))
        raise IncompatibleImage(
            f"It was stored with {before}, and this host runs {now}; start the server with"
            f" WRENN_DRIVER={machine.vmm}"
        )


def require_bounded(context: HostContext, layers: Layers) -> None:
    """Raise `NoCapacity` while the disk layers take too much to add one more.

    Housekeeping looks at a sandbox after each attempt to resume it, and puts them together.
    """
    if not layers.may_start(context.settings.disk_factor):
        raise NoCapacity(_UNTIDY, retry_after=_UNTIDY_SEC)


def require_disks(
    context: HostContext, manifest: PausedSandbox, image: Manifest, staged: Path | None = None
) -> None:
    """Raise `IncompatibleImage` unless each stored disk builds on the right one; blocks.

    `staged` holds the newest while it is not committed yet.
    """
    require_driver(context, manifest.machine)
    base = context.store.below(image)
    paused.require_disks(context.paths, manifest, context.driver.disk_format, base, staged)


_TSC_TOLERANCE: Final = 0.001
_OWN: Final = "its own"
_NAMES: Final = {
    "vcpus": "number of vcpus",
    "memory_mb": "memory size",
    "cpu_model": "CPU model",
    "accelerator": "accelerator",
    "vmm_version": "version of the machine monitor",
    "network": "kind of network",
    "kernel_sha256": "kernel",
    "firmware": "firmware",
}


def differences(stored: HardwareProfile, here: HardwareProfile) -> list[str]:
    """What of a stored machine is not as this host would make it, in words; empty if it fits."""
    found = [
        f"{words} ({getattr(stored, field) or _OWN}, here {getattr(here, field) or _OWN})"
        if field != "kernel_sha256"
        else words
        for field, words in _NAMES.items()
        if getattr(stored, field) != getattr(here, field)
    ]
    if abs(stored.tsc_khz - here.tsc_khz) > _TSC_TOLERANCE * max(stored.tsc_khz, here.tsc_khz):
        found.append(f"clock rate ({stored.tsc_khz} kHz, here {here.tsc_khz} kHz)")
    return found


def require(context: HostContext, stored: HardwareProfile, here: HardwareProfile) -> str:
    """Raise `IncompatibleImage` that names the differences, if there are any.

    Returns the digest of the kept engine that continues the machine. With it comes the version;
    without it the one that is installed must be of the same, and the digest is empty.
    """
    require_driver(context, stored)
    digest = _engine(context, stored)
    if digest:
        here = msgspec.structs.replace(
            here, vmm_version=stored.vmm_version, firmware=stored.firmware
        )
    found = differences(stored, here)
    if found:
        raise IncompatibleImage(
            "The stored machine does not fit this host; another " + ", ".join(found)
        )
    return digest


def _engine(context: HostContext, stored: HardwareProfile) -> str:
    engine = context.engines.of(stored)
    if engine is None:
        if stored.engine:
            name = f"{stored.vmm} {stored.vmm_version}, {stored.engine[:12]}"
            raise IncompatibleImage(f"The engine that has stored it ({name}) is not on this host")
        return ""
    if engine.retired_at is not None:
        raise IncompatibleImage(retirement(engine))
    return engine.digest
