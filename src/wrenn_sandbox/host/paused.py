"""Stored sandboxes on disk: `paused/<sandbox_id>/<generation>/`.

A generation is complete when its `manifest.json` is there: it is written last, after everything
else is synced, and the whole directory is renamed into place. A generation without one is only
the disk that a later layer builds on. All functions block.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final, cast

import msgspec
from blake3 import blake3

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.manifest import DISK, FILE_NAME, VMSTATE, FileDigest, HardwareProfile
from wrenn_sandbox.host.memory.pages import PAGE
from wrenn_sandbox.ids import ImageId, SandboxId, is_id

from . import failpoints
from .disk.base import Disk, DiskFormat
from .memory import diff
from .paths import (
    OWNER_ONLY_FILE,
    PASSAGE_DIRECTORY,
    Paths,
    sync_directory,
    write_durably,
)

FORMAT_VERSION: Final = 1
_STAGED: Final = ".new"
_DIGEST_LIMIT: Final = 256 * 1024 * 1024
_FILES: Final = frozenset({VMSTATE, DISK, diff.INDEX, diff.PAGES})
_DAMAGED: Final = "The stored sandbox is damaged: "


class PausedSandbox(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of one generation. Its pages are over the memory of image `image_id`.

    Of `files` without a digest only the size is known (disks above 256 MiB). `layers` are the older
    generations whose disks its disk builds on. Of a guest that stopped by itself, for the reason
    `stopped`, the disk is all that there is. `rebooted` says why it was booted from its disk
    before, where its owner did not ask for that.
    """

    format_version: int = FORMAT_VERSION
    sandbox_id: SandboxId
    generation: int
    created_at: datetime
    image_id: ImageId
    machine: HardwareProfile
    token: str
    disk_mb: int
    files: dict[str, FileDigest]
    layers: tuple[int, ...] = ()
    stopped: str = ""
    rebooted: str = ""


class _Version(msgspec.Struct):
    format_version: int


def stage(paths: Paths, sandbox_id: SandboxId, generation: int) -> Path:
    """An empty directory to write a generation into; raises OSError."""
    paths.stored(sandbox_id).mkdir(mode=PASSAGE_DIRECTORY, exist_ok=True)
    staged = _staged(paths, sandbox_id, generation)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(mode=PASSAGE_DIRECTORY)
    return staged


def unstage(paths: Paths, sandbox_id: SandboxId, generation: int) -> None:
    """Remove what was written of a generation that did not come to be."""
    shutil.rmtree(_staged(paths, sandbox_id, generation), ignore_errors=True)
    directory = paths.stored(sandbox_id)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def take_disk(staged: Path, overlay: Path) -> FileDigest:
    """Give the disk layer of a stopped machine to the staged generation, and describe it.

    No monitor may open it any more; one that has it open goes on with it.
    """
    os.link(overlay, staged / DISK, follow_symlinks=False)
    _seclude(staged / DISK)
    return describe(staged / DISK)


def add_layer(paths: Paths, sandbox_id: SandboxId, generation: int, overlay: Path) -> Path:
    """Make the disk layer of a machine that runs on with another one that of a generation.

    Nothing is synced, and its monitor may open it until `seclude_layer`. Raises OSError.
    """
    directory = paths.generation(sandbox_id, generation)
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(mode=PASSAGE_DIRECTORY, exist_ok=True)
    directory.mkdir(mode=PASSAGE_DIRECTORY)
    os.link(overlay, directory / DISK, follow_symlinks=False)
    return directory / DISK


def seclude_layer(paths: Paths, sandbox_id: SandboxId, generation: int) -> None:
    """Let no monitor open that any more and make it durable; raises OSError."""
    _seclude(paths.generation(sandbox_id, generation) / DISK)
    _sync_layers(paths, sandbox_id, (generation,))
    sync_directory(paths.stored(sandbox_id))
    sync_directory(paths.paused)


def _sync_layers(paths: Paths, sandbox_id: SandboxId, layers: Collection[int]) -> None:
    """Those that were made while the sandbox ran may not be durable yet."""
    for disk in disks(paths, sandbox_id, layers):
        _sync(disk)
        sync_directory(disk.parent)


def _seclude(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("the disk layer is not a file")
        if os.geteuid() == 0:
            os.fchown(fd, 0, 0)
        os.fchmod(fd, OWNER_ONLY_FILE)
    finally:
        os.close(fd)


def require_disks(
    paths: Paths,
    manifest: PausedSandbox,
    disk_format: DiskFormat,
    base: Disk,
    staged: Path | None = None,
) -> None:
    """Raise `IncompatibleImage` unless every disk layer is over what it was made over; OSError.

    `base` is the disk of the image. A layer may be over the base itself: the ones in between are
    in it then. The newest is in `staged` while it has no place yet.
    """
    allowed = [base]
    for disk in disks(paths, manifest.sandbox_id, manifest.layers):
        disk_format.require(disk, allowed, manifest.disk_mb << 20)
        allowed = [base, Disk(disk, raw=False)]
    newest = staged or paths.generation(manifest.sandbox_id, manifest.generation)
    disk_format.require(newest / DISK, allowed, manifest.disk_mb << 20)


def disks(paths: Paths, sandbox_id: SandboxId, layers: Collection[int]) -> tuple[Path, ...]:
    """The disk layers of some generations."""
    return tuple(paths.generation(sandbox_id, each) / DISK for each in layers)


def commit(paths: Paths, manifest: PausedSandbox) -> None:
    """Make a staged generation durable and complete, then drop the memory of older ones.

    Raises OSError, after which it is not there: its machine may run on.
    """
    staged = _staged(paths, manifest.sandbox_id, manifest.generation)
    _sync_layers(paths, manifest.sandbox_id, manifest.layers)
    withdraw_disks(paths, manifest.sandbox_id, manifest.layers)
    for name in manifest.files:
        _sync(staged / name)
    with open(staged / FILE_NAME, "xb", opener=_private) as file:
        file.write(_encoded(manifest))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(staged)
    failpoints.reach("pause.manifest")
    final = paths.generation(manifest.sandbox_id, manifest.generation)
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    failpoints.reach("pause.renamed")
    try:
        sync_directory(final.parent)
        sync_directory(paths.paused)
        keep(paths, manifest.sandbox_id, {manifest.generation, *manifest.layers})
        strip(paths, manifest.sandbox_id, manifest.layers)
    except BaseException:
        shutil.rmtree(final, ignore_errors=True)
        raise


def refer(paths: Paths, manifest: PausedSandbox, image_id: ImageId) -> PausedSandbox:
    """The next generation: the same state, over an image that holds all its pages.

    Raises OSError, after which the old one is as it was.
    """
    generation = manifest.generation + 1
    staged = stage(paths, manifest.sandbox_id, generation)
    old = paths.generation(manifest.sandbox_id, manifest.generation)
    try:
        for name in (VMSTATE, DISK):
            os.link(old / name, staged / name)
        new = msgspec.structs.replace(
            manifest,
            generation=generation,
            image_id=image_id,
            files={**manifest.files, **no_pages(staged, manifest.machine.memory_mb)},
        )
        commit(paths, new)
    except BaseException:
        shutil.rmtree(paths.generation(manifest.sandbox_id, generation), ignore_errors=True)
        unstage(paths, manifest.sandbox_id, generation)
        raise
    return new


def no_pages(staged: Path, memory_mb: int) -> Mapping[str, FileDigest]:
    """Write of a guest whose memory is all in its image that no page differs; raises OSError."""
    (staged / diff.INDEX).write_bytes(diff.encode_index([], (memory_mb << 20) // PAGE))
    (staged / diff.PAGES).touch()
    return entries(staged, (diff.INDEX, diff.PAGES))


def replace_disk(paths: Paths, sandbox_id: SandboxId, generation: int, disk: Path) -> None:
    """Put a layer in the place of one that shows the guest the very same. Raises OSError.

    A machine that has the old one open goes on with it.
    """
    _sync(disk)
    disk.rename(paths.generation(sandbox_id, generation) / DISK)
    sync_directory(paths.generation(sandbox_id, generation))


def note_layers(paths: Paths, manifest: PausedSandbox, layers: tuple[int, ...]) -> PausedSandbox:
    """Write down that the disk builds on these generations only; raises OSError."""
    new = msgspec.structs.replace(manifest, layers=layers)
    path = paths.generation(manifest.sandbox_id, manifest.generation) / FILE_NAME
    write_durably(path, _encoded(new))
    return new


def drop(paths: Paths, sandbox_id: SandboxId, generations: Collection[int]) -> None:
    """Remove generations that nothing refers to."""
    for generation in generations:
        shutil.rmtree(paths.generation(sandbox_id, generation), ignore_errors=True)


def newest(paths: Paths, sandbox_id: SandboxId) -> PausedSandbox | None:
    """The newest complete generation, or None.

    Raises `IncompatibleImage` where there is one that cannot be read.
    """
    try:
        for generation in sorted(_generations(paths, sandbox_id), reverse=True):
            path = paths.generation(sandbox_id, generation) / FILE_NAME
            with suppress(FileNotFoundError):
                manifest = _decoded(path.read_bytes())
                if (manifest.sandbox_id, manifest.generation) != (sandbox_id, generation):
                    raise IncompatibleImage(f"{_DAMAGED}its manifest", detail="it is another's")
                return manifest
    except OSError as error:
        raise IncompatibleImage(f"{_DAMAGED}its manifest", detail=str(error)) from error
    return None


def newest_number(paths: Paths, sandbox_id: SandboxId) -> int:
    """The highest number of a generation of which anything is there; 0 where there is none."""
    return max(_generations(paths, sandbox_id), default=0)


def check(paths: Paths, manifest: PausedSandbox) -> None:
    """Raise `IncompatibleImage` unless every file is as it was written."""
    check_memory(paths, manifest)
    check_disk(paths, manifest)


def check_memory(paths: Paths, manifest: PausedSandbox) -> None:
    """As `check`, of what only a machine that goes on where it was needs."""
    _check(paths, manifest, manifest.files.keys() - {DISK})


def check_disk(paths: Paths, manifest: PausedSandbox) -> None:
    """As `check`, of the disk and the layers that it builds on."""
    _check(paths, manifest, {DISK})
    for generation in manifest.layers:
        if not (paths.generation(manifest.sandbox_id, generation) / DISK).is_file():
            raise IncompatibleImage(f"{_DAMAGED}an older disk layer is missing")


def _check(paths: Paths, manifest: PausedSandbox, names: Collection[str]) -> None:
    directory = paths.generation(manifest.sandbox_id, manifest.generation)
    for name in sorted(names):
        entry = manifest.files[name]
        try:
            found = (directory / name).stat().st_size
        except OSError as error:
            raise IncompatibleImage(f"{_DAMAGED}{name} is missing", detail=str(error)) from error
        if found != entry.size:
            raise IncompatibleImage(
                f"{_DAMAGED}{name} has the wrong size", detail=f"{found} != {entry.size}"
            )
        for algorithm, wanted in ((blake3, entry.blake3), (hashlib.sha256, entry.sha256)):
            if wanted and _digest(directory / name, algorithm) != wanted:
                raise IncompatibleImage(f"{_DAMAGED}{name} has changed")


def consume(paths: Paths, manifest: PausedSandbox) -> None:
    """After a resume: what was stored is no state to go back to. `strip` frees its memory."""
    directory = paths.generation(manifest.sandbox_id, manifest.generation)
    (directory / FILE_NAME).unlink(missing_ok=True)
    sync_directory(directory)


def settle(paths: Paths, sandbox_id: SandboxId, layers: Collection[int]) -> None:
    """Behind a sandbox that runs: nothing stored but the disks that its own builds on."""
    strip(paths, sandbox_id, layers)
    keep(paths, sandbox_id, layers)


def strip(paths: Paths, sandbox_id: SandboxId, layers: Collection[int]) -> None:
    """Leave of these generations nothing but their disks, which newer ones build on."""
    for generation in layers:
        directory = paths.generation(sandbox_id, generation)
        (directory / FILE_NAME).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            for path in directory.iterdir():
                if path.name != DISK:
                    path.unlink(missing_ok=True)


def keep(paths: Paths, sandbox_id: SandboxId, generations: Collection[int]) -> None:
    """Remove every other generation, and the sandbox's directory when none is kept."""
    directory = paths.stored(sandbox_id)
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if not (path.name.isdigit() and int(path.name) in generations):
            shutil.rmtree(path, ignore_errors=True)
    if not generations:
        shutil.rmtree(directory, ignore_errors=True)


def all_ids(paths: Paths) -> list[SandboxId]:
    """Every sandbox of which something is stored."""
    return [SandboxId(path.name) for path in sorted(paths.paused.iterdir()) if path.is_dir()]


def share_disks(
    paths: Paths, sandbox_id: SandboxId, generations: Collection[int], uid: int
) -> None:
    """Let a monitor's group read, and only read, the disks that its new layer builds on."""
    if os.geteuid() != 0:
        return
    for disk in disks(paths, sandbox_id, generations):
        os.chown(disk, 0, uid)
        disk.chmod(0o440)


def withdraw_disks(paths: Paths, sandbox_id: SandboxId, generations: Collection[int]) -> None:
    """Let the server alone read disks again: the group of a slot is another machine's later.

    A monitor that has one open goes on with it.
    """
    if os.geteuid() != 0:
        return
    for disk in disks(paths, sandbox_id, generations):
        with suppress(FileNotFoundError):
            os.chown(disk, 0, 0)
            disk.chmod(OWNER_ONLY_FILE)


def described(manifest: PausedSandbox, path: Path) -> FileDigest:
    """The entry that a stored file, now at `path`, has in the manifest of an image; blocks."""
    entry = manifest.files[path.name]
    return entry if entry.blake3 else form.describe(path)


def describe(path: Path) -> FileDigest:
    """Size and digest of a file; no digest for a big one."""
    size = path.stat().st_size
    return FileDigest(size, blake3=_digest(path, blake3) if size <= _DIGEST_LIMIT else "")


def _digest(path: Path, algorithm: Callable[[], object]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, cast("Callable[[], hashlib._Hash]", algorithm)).hexdigest()


def entries(directory: Path, names: Collection[str]) -> Mapping[str, FileDigest]:
    """The descriptions of some files of a directory."""
    return {name: describe(directory / name) for name in names}


def _encoded(manifest: PausedSandbox) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest))


def _decoded(data: bytes) -> PausedSandbox:
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise IncompatibleImage(f"The stored sandbox has format version {version}")
        manifest = msgspec.json.decode(data, type=PausedSandbox)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IncompatibleImage(f"{_DAMAGED}its manifest", detail=str(error)) from error
    files = {DISK} if manifest.stopped else _FILES
    if manifest.files.keys() != files or not is_id("img", manifest.image_id):
        raise IncompatibleImage(f"{_DAMAGED}its manifest", detail="files or image")
    return manifest


def _generations(paths: Paths, sandbox_id: SandboxId) -> list[int]:
    directory = paths.stored(sandbox_id)
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if path.name.isdigit()]


def _staged(paths: Paths, sandbox_id: SandboxId, generation: int) -> Path:
    return paths.stored(sandbox_id) / f"{generation}{_STAGED}"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
