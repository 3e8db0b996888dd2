"""The images of one host: immutable directories, names that point at them, garbage collection.

All functions block; callers on an event loop use a thread.
"""

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.errors import IncompatibleImage, NotFound
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.paths import (
    IMMUTABLE_FILE,
    PUBLIC_DIRECTORY,
    Paths,
    sync_directory,
    write_durably,
)
from wrenn_sandbox.ids import ImageId, is_id

from . import manifest as form
from .manifest import HardwareProfile, Manifest
from .recipe import check_name
from .staging import discard, exclusive, staging, sweep, sync_file

_RESTORED: Final = frozenset({form.VMSTATE, form.MEMORY, form.INDEX, form.PAGES})


class _Pointer(msgspec.Struct, frozen=True):
    image_id: ImageId


@dataclass(frozen=True)
class NamedImage:
    """A template name and the image it stands for; `size` counts allocated bytes."""

    name: str
    manifest: Manifest
    size: int


@dataclass(frozen=True)
class BootFiles:
    """What a machine starts from, whichever image of a chain holds it."""

    kernel: Path
    initrd: Path
    runtime: Path
    kernel_args: str


def disk_beside(image: Manifest) -> Disk:
    """An image's disk as a layer in another image's directory names it."""
    return Disk(Path("..", image.image_id, form.DISK), raw=image.is_cold)


class ImageStore:
    """Images and template names under one data directory."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._sound: set[ImageId] = set()

    def templates(self) -> list[NamedImage]:
        """All template names in order; those whose image is unreadable are left out."""
        found = []
        for path in sorted(self._paths.templates.glob("[!.]*.json")):
            with contextlib.suppress(NotFound, IncompatibleImage):
                manifest = self.resolve(path.stem)
                found.append(NamedImage(path.stem, manifest, self.size(manifest.image_id)))
        return found

    def resolve(self, name: str) -> Manifest:
        """The image of a template name; raises NotFound or IncompatibleImage."""
        try:
            data = self._paths.template(check_name(name)).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"There is no template {name}") from None
        return self.open(_read_pointer(name, data))

    def open(self, image_id: ImageId) -> Manifest:
        """The manifest of a complete image; raises NotFound or IncompatibleImage."""
        directory = self.directory(image_id)
        try:
            data = (directory / form.FILE_NAME).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"There is no image {image_id}") from None
        manifest = form.decode(data)
        if manifest.image_id != image_id:
            raise IncompatibleImage("The image's manifest belongs to another image")
        form.check_files(directory, manifest)
        return manifest

    def open_sound(self, image_id: ImageId) -> Manifest:
        """Like `open`, but the first time reads what machines are restored from.

        That is not needed of what this server has just written. Raises NotFound, and
        IncompatibleImage when a byte is not as it was written.
        """
        manifest = self.open(image_id)
        if image_id not in self._sound:
            form.verify(self.directory(image_id), manifest, _RESTORED)
            self._sound.add(image_id)
        if manifest.memory_base_id is not None:
            self.open_sound(manifest.memory_base_id)
        return manifest

    def verify(self, image_id: ImageId) -> Manifest:
        """Like `open`, but reads every byte; takes about a second for each GB stored."""
        manifest = self.open(image_id)
        form.verify(self.directory(image_id), manifest)
        return manifest

    def directory(self, image_id: ImageId) -> Path:
        if not is_id("img", image_id):
            raise NotFound("There is no such image")
        return self._paths.image(image_id)

    def file(self, manifest: Manifest, name: str) -> Path:
        """The path of one of an image's own files."""
        return self.directory(manifest.image_id) / name

    def disk(self, manifest: Manifest) -> Path:
        """The file of an image's disk; a layer goes on what `below` says."""
        while manifest.private and manifest.base_image_id is not None:
            manifest = self.open(manifest.base_image_id)
        return self.file(manifest, form.DISK)

    def below(self, manifest: Manifest) -> Disk:
        """An image's disk as what a layer is put on; raises like `disk`."""
        return Disk(self.disk(manifest), raw=manifest.is_cold)

    def memory(self, manifest: Manifest) -> Path:
        """The memory that machines of a snapshot map privately, or its pages over `memory_below`.

        In its directory is what says where these belong.
        """
        return self.file(manifest, form.MEMORY if manifest.memory_base_id is None else form.PAGES)

    def memory_below(self, manifest: Manifest) -> Path | None:
        """The whole memory that an image's own pages are over; None where it has its own."""
        if manifest.memory_base_id is None:
            return None
        return self.directory(manifest.memory_base_id) / form.MEMORY

    def vmstate(self, manifest: Manifest) -> Path:
        """The device state of a snapshot."""
        return self.file(manifest, form.VMSTATE)

    def cold(self, manifest: Manifest) -> Manifest:
        """The image that was never booted from which this one was made; it may be itself."""
        while manifest.base_image_id is not None:
            manifest = self.open(manifest.base_image_id)
        return manifest

    def boot_files(self, manifest: Manifest) -> BootFiles:
        """Kernel, first file system and runtime, which the cold image of the chain has."""
        base = self.cold(manifest)
        return BootFiles(
            kernel=self.file(base, form.KERNEL),
            initrd=self.file(base, form.INITRD),
            runtime=self.file(base, form.RUNTIME),
            kernel_args=base.kernel_args,
        )

    def size(self, image_id: ImageId) -> int:
        """Bytes that the image takes on the disk, with private memory that is kept for it."""
        size = sum(path.stat().st_blocks * 512 for path in self.directory(image_id).iterdir())
        below = self.open(image_id).memory_base_id
        if below is None or not self.open(below).private:
            return size
        return size + self.size(below)

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """A directory to make an image in, removed in the end unless it was published."""
        return staging(self._paths.images)

    def publish(self, made: Path, manifest: Manifest, *, name: str | None = None) -> Manifest:
        """Makes a staged image durable and visible, and lets `name` stand for it.

        When the same image is already there, that one stays and `made` is left to its maker.
        Raises IncompatibleImage when the staged files are not what the manifest says.
        """
        form.check_files(made, manifest)
        write_durably(made / form.FILE_NAME, form.encode(manifest), mode=IMMUTABLE_FILE)
        for path in made.iterdir():
            path.chmod(IMMUTABLE_FILE)
            sync_file(path)
        made.chmod(PUBLIC_DIRECTORY)
        sync_directory(made)
        with exclusive(self._paths.images_lock):
            published = self._existing(manifest.image_id)
            if published is None:
                made.rename(self.directory(manifest.image_id))
                sync_directory(self._paths.images)
                published = manifest
                self._sound.add(manifest.image_id)
            if name is not None:
                pointer = msgspec.json.encode(_Pointer(manifest.image_id))
                write_durably(self._paths.template(check_name(name)), pointer, mode=IMMUTABLE_FILE)
        return published

    def hold(self, image_id: ImageId) -> None:
        """Keep an image, made or yet to be, that the control plane gives a name."""
        with exclusive(self._paths.images_lock):
            write_durably(self._paths.held / image_id, b"")

    def let_go(self, image_id: ImageId) -> None:
        """No longer keep an image for the control plane; harmless when it was not kept."""
        with exclusive(self._paths.images_lock):
            (self._paths.held / image_id).unlink(missing_ok=True)
            sync_directory(self._paths.held)

    def forget_missing(self) -> None:
        """Drop what was to be kept and never made; only while nobody makes snapshots."""
        for image_id in self.held():
            if not self.directory(image_id).is_dir():
                self.let_go(image_id)

    def held(self) -> set[ImageId]:
        """The images that the control plane has given a name."""
        return {ImageId(path.name) for path in self._paths.held.iterdir()}

    def use(self, image_id: ImageId) -> None:
        """Note that an image was used just now; raises NotFound."""
        try:
            os.utime(self.directory(image_id))
        except FileNotFoundError:
            raise NotFound(f"There is no image {image_id}") from None

    def kept(self, variants: int | None = None, engine: str | None = None) -> set[ImageId]:
        """The images that are kept whether or not a sandbox needs them, with their bases.

        Those are what a name or the control plane stands for, and of the variants of named
        templates the so many that were used last and that `engine` has made, if it is given.
        Raises IncompatibleImage where one of them cannot be read.
        """
        return self.with_bases(self._wanted(variants, engine) & self._present())

    def machines(self, images: Collection[ImageId]) -> list[HardwareProfile]:
        """What those of these images that are there need to be restored.

        Raises NotFound and IncompatibleImage.
        """
        found = (self.open(image_id).machine for image_id in self._present() & set(images))
        return [each for each in found if each is not None]

    def collect(
        self,
        in_use: Collection[ImageId],
        *,
        variants: int | None = None,
        engine: str | None = None,
    ) -> set[ImageId]:
        """Removes the images that neither `in_use`, a name nor a kept image needs.

        A variant is needed as long as a template name stands for its base, no more than `variants`
        others were used later, and new sandboxes start from it: `engine` has made it. Removes
        nothing while one of the needed images cannot be read: it may need another one.
        """
        with exclusive(self._paths.images_lock):
            present = self._present()
            try:
                needed = self.with_bases({*in_use, *self._wanted(variants, engine)} & present)
            except (IncompatibleImage, OSError):
                return set()
            for image_id in present - needed:
                self._sound.discard(image_id)
                discard(self.directory(image_id))
            return present - needed

    def _present(self) -> set[ImageId]:
        return {ImageId(p.name) for p in self._paths.images.iterdir() if is_id("img", p.name)}

    def _wanted(self, variants: int | None, engine: str | None) -> set[ImageId]:
        pointed = self._pointed_at()
        found = [each for each in self._present() if self._is_variant_of(each, pointed, engine)]
        found.sort(key=self._last_use, reverse=True)
        return {*pointed, *self.held(), *found[:variants]}

    def _last_use(self, image_id: ImageId) -> float:
        try:
            return self.directory(image_id).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _is_variant_of(
        self, image_id: ImageId, bases: Collection[ImageId], engine: str | None
    ) -> bool:
        try:
            manifest = self.open(image_id)
        except (NotFound, IncompatibleImage):
            return False
        if engine is not None and (manifest.machine is None or manifest.machine.engine != engine):
            return False
        return manifest.variant and manifest.base_image_id in bases

    def sweep(self) -> int:
        """Removes what killed builds left behind; harmless while others build."""
        removed = sweep(self._paths.images) + sweep(self._paths.cache)
        with exclusive(self._paths.images_lock):
            for path in self._paths.templates.glob(".*.new"):
                path.unlink()
                removed += 1
        return removed

    def _existing(self, image_id: ImageId) -> Manifest | None:
        directory = self.directory(image_id)
        if not directory.exists():
            return None
        try:
            return self.verify(image_id)
        except (NotFound, IncompatibleImage):
            discard(directory)
            return None

    def _pointed_at(self) -> set[ImageId]:
        paths = self._paths.templates.glob("[!.]*.json")
        return {_read_pointer(path.stem, path.read_bytes()) for path in paths}

    def with_bases(self, images: set[ImageId]) -> set[ImageId]:
        """These images and all that they build on; raises IncompatibleImage."""
        needed: set[ImageId] = set()
        waiting = list(images)
        while waiting:
            image_id = waiting.pop()
            if image_id in needed:
                continue
            needed.add(image_id)
            with contextlib.suppress(NotFound):
                image = self.open(image_id)
                bases = (image.base_image_id, image.memory_base_id)
                waiting += [each for each in bases if each is not None]
        return needed


def _read_pointer(name: str, data: bytes) -> ImageId:
    try:
        return msgspec.json.decode(data, type=_Pointer).image_id
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IncompatibleImage(f"Template {name} is damaged", detail=str(error)) from error
