"""Generations of a paused sandbox, with files of a few bytes."""

from datetime import UTC, datetime

from wrenn_sandbox.host import paused
from wrenn_sandbox.host.images.manifest import HardwareProfile
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.ids import ImageId, SandboxId

SANDBOX_ID = SandboxId("sb-" + "a" * 20)


_MACHINE = HardwareProfile(
    vcpus=1,
    memory_mb=512,
    cpu_model="max",
    accelerator="tcg",
    vmm="qemu",
    vmm_version="7.2.22",
    network="tap",
)


FILES = ("vmstate", "memory.idx", "memory.diff", "disk")


def staged(paths: Paths, generation: int, layers: tuple[int, ...] = ()) -> PausedSandbox:
    """A generation with all its files, not yet committed."""
    directory = paused.stage(paths, SANDBOX_ID, generation)
    for name in FILES:
        (directory / name).write_bytes(f"{name} of {generation}".encode())
    return PausedSandbox(
        sandbox_id=SANDBOX_ID,
        generation=generation,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        image_id=ImageId("img-" + "b" * 20),
        machine=_MACHINE,
        token="secret",
        disk_mb=64,
        files=dict(paused.entries(directory, FILES)),
        layers=layers,
    )


def commit(paths: Paths, generation: int, layers: tuple[int, ...] = ()) -> PausedSandbox:
    manifest = staged(paths, generation, layers)
    paused.commit(paths, manifest)
    return manifest
