"""Manifest of a stored image: what it consists of and which machine it fits.

Three kinds share the form. A *cold* image was never booted: `kernel`, `initrd`, `runtime` and
`disk` (raw), no `machine`. A *snapshot* has `base_image_id` and `machine`, and holds `vmstate`,
`memory` and `disk` (a layer over the base's disk); kernel and runtime are the base's. One with
`memory_base_id` holds no `memory` but the pages that differ from that image's, which is whole:
`memory.idx` and `memory.diff`. A *private* image is what one stored sandbox's pages are over:
`memory` alone; its base is the snapshot on whose disk that sandbox's layers build.
"""

import base64
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.ids import ImageId, is_id

FORMAT_VERSION: Final = 1
FILE_NAME: Final = "manifest.json"

KERNEL: Final = "kernel"
INITRD: Final = "initrd"
RUNTIME: Final = "runtime"
DISK: Final = "disk"
VMSTATE: Final = "vmstate"
MEMORY: Final = "memory"
INDEX: Final = "memory.idx"
PAGES: Final = "memory.diff"

_COLD_FILES = frozenset({KERNEL, INITRD, RUNTIME, DISK})
_SNAPSHOT_FILES = frozenset({VMSTATE, MEMORY, DISK})
_PRIVATE_FILES = frozenset({MEMORY})
_PAGE_FILES = frozenset({INDEX, PAGES})
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BLOCK = 64 * 1024
_ZEROS = bytes(_BLOCK)


class FileDigest(msgspec.Struct, frozen=True):
    """One file: its length in bytes, and in hex the digest that it was given.

    Files of images have their `content_digest`. What is stored of a sandbox is hashed by BLAKE3,
    which takes a quarter of the time, and so is what an image takes over of that; servers of before
    used SHA-256.
    """

    size: int
    sha256: str = ""
    blake3: str = ""


class HardwareProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a memory image was made on; restoring needs the very same."""

    vcpus: int
    memory_mb: int
    cpu_model: str
    accelerator: str
    vmm: str
    vmm_version: str
    network: str
    firmware: str = ""
    kernel_sha256: str = ""
    tsc_khz: int = 0
    """Rate of the time-stamp counter that an emulated guest has seen."""
    engine: str = ""
    """Digest of the engine that it ran on; none where a server of before stored it."""


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What an OCI image says of the processes in it; the guest agent keeps to the first three.

    `user` is a name or number, and after a colon a group if there is one. Without a `workdir`
    commands start in the user's home directory.
    """

    user: str = "root"
    workdir: str = ""
    env: dict[str, str] = {}
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about an image but its bytes."""

    format_version: int = FORMAT_VERSION
    image_id: ImageId
    created_at: datetime
    name: str
    recipe_sha256: str
    files: dict[str, FileDigest]
    kernel_args: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    base_image_id: ImageId | None = None
    memory_base_id: ImageId | None = None
    """The image with the memory that its own pages are over, where it has no more than those."""
    variant: bool = False
    """Made from its base for a size that somebody asked for; goes with the base's name."""
    private: bool = False
    """Memory that one stored sandbox refers to; nothing that a machine could be started from."""
    machine: HardwareProfile | None = None
    source: str = ""
    """The OCI image that its disk was made of, with the digest; none where that was a recipe."""
    defaults: Defaults | None = None
    token: str = ""
    """What the agent in a snapshot expects before it takes a new identity; none in a variant."""

    @property
    def is_cold(self) -> bool:
        """Whether the image was never booted."""
        return self.machine is None

    @property
    def disk_size(self) -> int:
        """Size in bytes of the disk that the guest sees."""
        return self.disk_mb * 1024 * 1024


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic")) + b"\n"


def decode(data: bytes) -> Manifest:
    """Reads a manifest; raises IncompatibleImage when it is damaged or of another version."""
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
    except _UNREADABLE as error:
        raise IncompatibleImage("The image's manifest is damaged", detail=str(error)) from error
    if version != FORMAT_VERSION:
        raise IncompatibleImage(
            f"The image has format version {version}, this server reads version {FORMAT_VERSION}"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except _UNREADABLE as error:
        raise IncompatibleImage("The image's manifest is damaged", detail=str(error)) from error
    _check(manifest)
    return manifest


class _Version(msgspec.Struct):
    format_version: int


def _check(manifest: Manifest) -> None:
    if manifest.is_cold:
        wanted = _COLD_FILES
    else:
        wanted = _PRIVATE_FILES if manifest.private else _SNAPSHOT_FILES
    above = manifest.memory_base_id
    if above is not None:
        wanted = (wanted - {MEMORY}) | _PAGE_FILES
    missing = wanted - manifest.files.keys()
    if missing:
        raise IncompatibleImage(f"The image's manifest lacks {', '.join(sorted(missing))}")
    names = manifest.files.keys() - _PAGE_FILES
    if any(not name.isalnum() for name in names) or not is_id("img", manifest.image_id):
        raise IncompatibleImage("The image's manifest is damaged")
    if above is not None and (manifest.is_cold or manifest.private or not is_id("img", above)):
        raise IncompatibleImage("The image's manifest is damaged")
    if manifest.is_cold != (manifest.base_image_id is None):
        raise IncompatibleImage("The image's manifest is damaged")


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raises IncompatibleImage when a file is missing or has another length."""
    for name, entry in manifest.files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise IncompatibleImage(f"The image's {name} is missing", detail=str(error)) from error
        if size != entry.size:
            raise IncompatibleImage(
                f"The image's {name} is damaged: {size} bytes instead of {entry.size}"
            )


def verify(directory: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Reads every file, or those with one of these names.

    Raises IncompatibleImage when a byte is not as it was written.
    """
    check_files(directory, manifest)
    for name, entry in manifest.files.items():
        if names is not None and name not in names:
            continue
        try:
            found = _digest_as(directory / name, entry)
        except OSError as error:
            raise IncompatibleImage(
                f"The image's {name} is unreadable", detail=str(error)
            ) from error
        if found != entry:
            raise IncompatibleImage(f"The image's {name} is damaged")


def describe(path: Path) -> FileDigest:
    """The entry of a file, by reading it."""
    return FileDigest(size=path.stat().st_size, sha256=content_digest(path))


def _digest_as(path: Path, entry: FileDigest) -> FileDigest:
    """The entry of a file whose size is right, by the digest that it was given before."""
    if not entry.blake3:
        return FileDigest(entry.size, sha256=content_digest(path))
    digest = blake3()
    digest.update_mmap(path)
    return FileDigest(entry.size, sha256=entry.sha256, blake3=digest.hexdigest())


def content_digest(path: Path) -> str:
    """SHA-256 in hex of a file's content, quick on sparse files.

    Digested are the length (8 bytes, big-endian) and each 64 KiB block that is not all zeros,
    after its offset (8 bytes, big-endian): how holes are laid out makes no difference.
    """
    digest = hashlib.sha256(path.stat().st_size.to_bytes(8, "big"))
    with path.open("rb", buffering=0) as file:
        for offset in _blocks_with_data(file.fileno()):
            block = os.pread(file.fileno(), _BLOCK, offset)
            if block != _ZEROS[: len(block)]:
                digest.update(offset.to_bytes(8, "big"))
                digest.update(block)
    return digest.hexdigest()


def _blocks_with_data(fd: int) -> Iterator[int]:
    end = os.fstat(fd).st_size
    position = 0
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            return
        stop = os.lseek(fd, start, os.SEEK_HOLE)
        first = max(start // _BLOCK * _BLOCK, position)
        last = -(-stop // _BLOCK) * _BLOCK
        yield from range(first, min(last, end), _BLOCK)
        position = last


def derived_id(files: Mapping[str, FileDigest], *facts: str) -> ImageId:
    """The id of an image that follows from its content: the same content has the same id."""
    digest = hashlib.sha256()
    for name, entry in sorted(files.items()):
        digest.update(f"{name} {entry.size} {entry.sha256}\n".encode())
    for fact in facts:
        digest.update(fact.encode() + b"\n")
    return ImageId("img-" + base64.b32encode(digest.digest()).decode()[:20].lower())


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
