"""Images made of a few bytes, published in a store."""

from pathlib import Path

import msgspec

from wrenn_sandbox.host.images import manifest
from wrenn_sandbox.host.images.manifest import HardwareProfile, Manifest
from wrenn_sandbox.host.images.store import ImageStore


def fill(made: Path, names: tuple[str, ...], content: bytes) -> dict[str, manifest.FileDigest]:
    for name in names:
        (made / name).write_bytes(content + name.encode())
    return {name: manifest.describe(made / name) for name in names}


def cold(made: Path, content: bytes) -> Manifest:
    files = fill(made, ("kernel", "initrd", "runtime", "disk"), content)
    return Manifest(
        image_id=manifest.derived_id(files),
        created_at=manifest.now(),
        name="minimal",
        recipe_sha256="00",
        files=files,
        kernel_args="quiet",
        vcpus=1,
        memory_mb=512,
        disk_mb=64,
    )


def snapshot(made: Path, base: Manifest, content: bytes) -> Manifest:
    files = fill(made, ("vmstate", "memory", "disk"), content)
    machine = HardwareProfile(
        vcpus=1,
        memory_mb=512,
        cpu_model="max",
        accelerator="tcg",
        vmm="qemu",
        vmm_version="7.2.22",
        network="tap",
        kernel_sha256="",
    )
    return msgspec.structs.replace(
        base,
        image_id=manifest.derived_id(files),
        base_image_id=base.image_id,
        files=files,
        machine=machine,
    )


def publish(store: ImageStore, content: bytes, name: str | None = None) -> Manifest:
    with store.staging() as made:
        return store.publish(made, cold(made, content), name=name)


def publish_snapshot(store: ImageStore, base: Manifest, content: bytes) -> Manifest:
    with store.staging() as made:
        return store.publish(made, snapshot(made, base, content))
