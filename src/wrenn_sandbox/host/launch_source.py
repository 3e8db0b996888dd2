"""What a machine is started from: an image, a paused sandbox, or the disk of one."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.vmm.base import MachineSpec, Snapshot

from . import paused
from .context import HostContext
from .disk.base import Disk
from .images import manifest as form
from .journal import Record
from .paused import PausedSandbox


@dataclass(frozen=True)
class LaunchSource:
    """What a machine continues: an image's own snapshot, a stored one over it, or nothing.

    `disk` is what the machine's disk layer builds on, `stored_disks` what that
    builds on besides the disks of images; `token` is what the guest's agent expects, if anything;
    memory is in MiB. `engine` is the digest of what continues the snapshot, empty for the driver's
    own.
    """

    image: Manifest
    vcpus: int
    memory_mb: int
    disk: Disk
    snapshot: Snapshot | None = None
    stored_disks: tuple[Path, ...] = ()
    token: str | None = None
    generation: int = 0
    layers: tuple[int, ...] = ()
    engine: str = ""
    rebooted: str = ""
    """Why a snapshot of a machine that was booted is continued, where nobody asked for that."""


def source_of(context: HostContext, image: Manifest, engine: str = "") -> LaunchSource:
    """What a machine that continues an image's own snapshot starts from, and with which engine."""
    return LaunchSource(
        image=image,
        vcpus=image.vcpus,
        memory_mb=image.memory_mb,
        disk=context.store.below(image),
        snapshot=Snapshot(context.store.vmstate(image)),
        token=image.token or None,
        engine=engine,
    )


def paused_source(context: HostContext, manifest: PausedSandbox, image: Manifest) -> LaunchSource:
    """What a machine that continues a stored one, whose memory is over `image`, starts from."""
    paths = context.paths
    directory = paths.generation(manifest.sandbox_id, manifest.generation)
    layered = context.driver.disk_format.layered
    layers = (*manifest.layers, manifest.generation) if layered else ()
    return LaunchSource(
        image=image,
        vcpus=manifest.machine.vcpus,
        memory_mb=manifest.machine.memory_mb,
        disk=Disk(directory / form.DISK, raw=False),
        snapshot=Snapshot(
            directory / form.VMSTATE, directory, partial(paused.check_memory, paths, manifest)
        ),
        stored_disks=paused.disks(paths, manifest.sandbox_id, layers),
        token=manifest.token,
        generation=manifest.generation,
        layers=layers,
        rebooted=manifest.rebooted,
    )


def without_memory(source: LaunchSource) -> LaunchSource:
    """The same machine, started from its disk: what was in its memory is gone."""
    return replace(source, snapshot=None, token=None, rebooted="")


def spec_of(context: HostContext, record: Record) -> MachineSpec:
    """What the driver needs to know of a recorded machine; blocks."""
    image = context.store.open(record.image_id)
    boot = context.store.boot_files(image)
    disks = {context.store.disk(each) for each in (image, context.store.cold(image))}
    return MachineSpec(
        files=replace(context.paths.machine(record.machine_id), disk=record.disk),
        slot=record.slot,
        vcpus=record.vcpus,
        memory_mb=record.memory_mb,
        kernel=boot.kernel,
        initrd=boot.initrd,
        kernel_args=boot.kernel_args,
        runtime=boot.runtime,
        disk_mb=image.disk_mb,
        disks=tuple(disks),
        memory=None if image.is_cold else context.store.memory(image),
        memory_below=context.store.memory_below(image),
        private_memory=image.private,
        engine=record.engine,
        disk_bytes_per_sec=0 if image.is_cold else context.settings.disk_mbps << 20,
        disk_operations_per_sec=0 if image.is_cold else context.settings.disk_iops,
    )
