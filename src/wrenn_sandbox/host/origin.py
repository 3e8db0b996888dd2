"""What machines are made from: what all of a host's share, and what each of them continues."""

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from wrenn_sandbox.host import stored
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.network.slot import Slot, SlotSource
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.stored import StoredSandbox
from wrenn_sandbox.host.vmm.base import Driver, MachineSpec, Snapshot
from wrenn_sandbox.settings import Settings


@dataclass(frozen=True)
class Parts:
    """What every machine of a host shares."""

    settings: Settings
    paths: Paths
    store: ImageStore
    driver: Driver
    slots: SlotSource
    network: str
    connect: Callable[[Slot], Awaitable[socket.socket]]
    clock: Callable[[], datetime]
    random: Callable[[int], bytes]


@dataclass(frozen=True)
class Origin:
    """What a machine continues: an image's own snapshot, a stored one over it, or nothing.

    `disk` and its format are what the machine's disk layer builds on, `stored_disks` what that
    builds on besides the disks of images; `token` is what the guest's agent expects, if anything;
    memory is in MiB.
    """

    image: Manifest
    vcpus: int
    memory_mb: int
    disk: Path
    disk_format: str
    snapshot: Snapshot | None = None
    stored_disks: tuple[Path, ...] = ()
    token: str | None = None
    generation: int = 0
    layers: tuple[int, ...] = ()


def origin_of(parts: Parts, image: Manifest) -> Origin:
    """What a machine that continues an image's own snapshot starts from."""
    return Origin(
        image=image,
        vcpus=image.vcpus,
        memory_mb=image.memory_mb,
        disk=parts.store.disk(image),
        disk_format=image.disk_format,
        snapshot=Snapshot(parts.store.vmstate(image)),
        token=image.token or None,
    )


def stored_origin(paths: Paths, manifest: StoredSandbox, image: Manifest) -> Origin:
    """What a machine that continues a stored one, whose memory is over `image`, starts from."""
    directory = paths.generation(manifest.sandbox_id, manifest.generation)
    layers = (*manifest.layers, manifest.generation)
    return Origin(
        image=image,
        vcpus=manifest.machine.vcpus,
        memory_mb=manifest.machine.memory_mb,
        disk=directory / form.DISK,
        disk_format="qcow2",
        snapshot=Snapshot(directory / form.VMSTATE, directory),
        stored_disks=stored.disks(paths, manifest.sandbox_id, layers),
        token=manifest.token,
        generation=manifest.generation,
        layers=layers,
    )


def without_memory(origin: Origin) -> Origin:
    """The same machine, started from its disk: what was in its memory is gone."""
    return replace(origin, snapshot=None, token=None)


def spec_of(parts: Parts, record: Record) -> MachineSpec:
    """What the driver needs to know of a recorded machine; blocks."""
    image = parts.store.open(record.image_id)
    boot = parts.store.boot_files(image)
    disks = {parts.store.disk(each) for each in (image, parts.store.cold(image))}
    return MachineSpec(
        files=parts.paths.machine(record.machine_id),
        slot=record.slot,
        vcpus=record.vcpus,
        memory_mb=record.memory_mb,
        kernel=boot.kernel,
        initrd=boot.initrd,
        kernel_args=boot.kernel_args,
        runtime=boot.runtime,
        disk_mb=image.disk_mb,
        disks=tuple(disks),
        memory=None if image.is_cold else parts.store.memory(image),
        disk_bytes_per_sec=0 if image.is_cold else parts.settings.disk_mbps << 20,
        disk_operations_per_sec=0 if image.is_cold else parts.settings.disk_iops,
    )
