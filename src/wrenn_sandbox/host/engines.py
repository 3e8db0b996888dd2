"""The engines of one host: each VMM by its content, kept for what it has stored.

An engine is a directory with all files of a VMM and a manifest, which is written last. Its name is
a digest of its content: the same VMM is kept once. One that was retired has its manifest alone.
All functions block.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.errors import IncompatibleImage, NotFound

from . import failpoints
from .images.manifest import FileDigest, HardwareProfile, describe
from .images.staging import discard, exclusive, staging, sweep, sync_file
from .memory import sparse
from .paths import (
    IMMUTABLE_FILE,
    PROGRAM_FILE,
    PUBLIC_DIRECTORY,
    Paths,
    sync_directory,
    write_durably,
)

FORMAT_VERSION: Final = 1
_MANIFEST: Final = "manifest.json"
_DIGITS: Final = frozenset("0123456789abcdef")
_LENGTH: Final = 64
NAMES: Final = {"qemu": "QEMU", "firecracker": "Firecracker"}
"""What people call the VMMs."""
_DAMAGED: Final = "An engine of this host is damaged"


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of an engine; `files` by their names below its directory."""

    format_version: int = FORMAT_VERSION
    digest: str
    vmm: str
    vmm_version: str
    created_at: datetime
    files: dict[str, FileDigest]
    retired_at: datetime | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{NAMES.get(self.vmm, self.vmm)} {self.vmm_version}"

    @property
    def size(self) -> int:
        """Bytes of its files; none once it is retired."""
        return 0 if self.retired_at else sum(each.size for each in self.files.values())


class EngineStore:
    """The engines under one data directory."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._known: dict[str, tuple[tuple[int, int], Engine]] = {}
        self._sound: set[str] = set()

    def directory(self, digest: str) -> Path:
        """Where its files are; raises `NotFound` for what is no digest."""
        if len(digest) != _LENGTH or not _DIGITS.issuperset(digest):
            raise NotFound("There is no such engine")
        return self._paths.engine(digest)

    def open(self, digest: str) -> Engine:
        """An engine that is or was kept; raises `NotFound` and `IncompatibleImage`.

        Its manifest is read again when it has changed.
        """
        path = self.directory(digest) / _MANIFEST
        try:
            facts = path.stat()
            found = (facts.st_ino, facts.st_mtime_ns)
            if (known := self._known.get(digest)) is not None and known[0] == found:
                return known[1]
            engine = msgspec.json.decode(path.read_bytes(), type=Engine)
        except FileNotFoundError:
            raise NotFound("There is no such engine") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise IncompatibleImage(_DAMAGED, detail=f"{path}: {error}") from error
        if (engine.format_version, engine.digest) != (FORMAT_VERSION, digest):
            raise IncompatibleImage(_DAMAGED, detail=f"{path}: another version or engine")
        self._known[digest] = (found, engine)
        return engine

    def sound(self, digest: str) -> Engine:
        """As `open`, of one that can be started; the first time every byte is read.

        Raises `IncompatibleImage` as well where it is retired or not as it was kept.
        """
        engine = self.open(digest)
        if engine.retired_at is not None:
            raise IncompatibleImage(retirement(engine))
        if digest not in self._sound:
            _verify(self.directory(digest), engine)
            self._sound.add(digest)
        return engine

    def all(self) -> list[Engine]:
        """Every engine, the oldest first; raises `IncompatibleImage`."""
        return sorted(map(self.open, self._digests()), key=lambda each: each.created_at)

    def of(self, machine: HardwareProfile) -> Engine | None:
        """The engine that has stored a machine, which may be retired; None if it is not known.

        Servers of before named its version alone: the newest one of that version then that is not
        retired, if there is one. Raises `IncompatibleImage`.
        """
        if machine.engine:
            try:
                return self.open(machine.engine)
            except NotFound:
                return None
        found = [each for each in self.all() if _is_of(each, machine)]
        return max(found, key=lambda each: (each.retired_at is None, each.created_at), default=None)

    def keep(self, vmm: str, version: str, sources: Mapping[str, Path]) -> Engine:
        """Keep the VMM that consists of these files, by their names below its directory.

        One that is there already stays, retired ones too. Raises OSError.
        """
        with staging(self._paths.engines) as made:
            for name, source in sources.items():
                _copy(source, made / name)
            failpoints.reach("engine.copied")
            files = {name: describe(made / name) for name in sources}
            engine = Engine(
                digest=_digest(vmm, version, files),
                vmm=vmm,
                vmm_version=version,
                created_at=datetime.now(UTC).replace(microsecond=0),
                files=files,
            )
            _seal(made, engine)
            failpoints.reach("engine.sealed")
            with exclusive(self._paths.engines_lock):
                there = self._intact(engine.digest)
                if there is not None:
                    return there
                made.rename(self.directory(engine.digest))
                sync_directory(self._paths.engines)
        failpoints.reach("engine.published")
        self._sound.add(engine.digest)
        return engine

    def retire(self, digest: str) -> Engine:
        """Remove an engine for good, save for the note that it was here. Safe to repeat.

        VMs that it runs go on. Raises OSError, `NotFound` and `IncompatibleImage`.
        """
        with exclusive(self._paths.engines_lock):
            engine = self.open(digest)
            directory = self.directory(digest)
            if engine.retired_at is None:
                at = datetime.now(UTC).replace(microsecond=0)
                engine = msgspec.structs.replace(engine, retired_at=at)
                write_durably(directory / _MANIFEST, _encoded(engine), mode=IMMUTABLE_FILE)
                failpoints.reach("engine.retired")
            _strip(directory)
        return engine

    def needed_by(self, machines: Iterable[HardwareProfile]) -> set[str]:
        """The engines that such machines, stored, need to go on. Raises `IncompatibleImage`."""
        named, unnamed = set(), []
        for machine in machines:
            if machine.engine:
                named.add(machine.engine)
            else:
                unnamed.append(machine)
        if unnamed:
            kept = self.all()
            named |= {e.digest for e in kept if any(_is_of(e, each) for each in unnamed)}
        return named

    def collect(self, needed: Collection[str]) -> set[str]:
        """Remove the engines that nothing needs, and what is left of retired ones."""
        with exclusive(self._paths.engines_lock):
            unneeded = self._digests() - set(needed)
            for digest in unneeded:
                self._sound.discard(digest)
                discard(self.directory(digest))
            for digest in self._digests() - unneeded:
                if self.open(digest).retired_at is not None:
                    _strip(self.directory(digest))
        return unneeded

    def sweep(self) -> int:
        """Remove what killed servers left behind; harmless while others work."""
        return sweep(self._paths.engines)

    @property
    def are_several(self) -> bool:
        """Whether any could be unneeded: one of them is the host's own."""
        return len(self._digests()) > 1

    def _digests(self) -> set[str]:
        return {each.name for each in self._paths.engines.iterdir() if len(each.name) == _LENGTH}

    def _intact(self, digest: str) -> Engine | None:
        """The engine that is there, unless its files are damaged: those are removed."""
        if not self.directory(digest).exists():
            return None
        try:
            engine = self.open(digest)
            if engine.retired_at is None:
                _verify(self.directory(digest), engine)
        except (NotFound, IncompatibleImage):
            self._sound.discard(digest)
            discard(self.directory(digest))
            return None
        self._sound.add(digest)
        return engine


class _Note(msgspec.Struct, frozen=True):
    engine: str


def noted(note: Path) -> str:
    """The digest of the engine that the last server started VMs with; empty where there is none."""
    try:
        return msgspec.json.decode(note.read_bytes(), type=_Note).engine
    except (OSError, msgspec.DecodeError):
        return ""


def retirement(engine: Engine) -> str:
    """What is said where a retired engine would be needed."""
    return f"{engine.title}, which stored it, was retired by the operator of this host"


def _is_of(engine: Engine, machine: HardwareProfile) -> bool:
    return (engine.vmm, engine.vmm_version) == (machine.vmm, machine.vmm_version)


def _digest(vmm: str, version: str, files: Mapping[str, FileDigest]) -> str:
    digest = hashlib.sha256(f"{vmm} {version}\n".encode())
    for name, entry in sorted(files.items()):
        digest.update(f"{name} {entry.size} {entry.sha256}\n".encode())
    return digest.hexdigest()


def _encoded(engine: Engine) -> bytes:
    return msgspec.json.format(msgspec.json.encode(engine, order="deterministic")) + b"\n"


def _copy(source: Path, target: Path) -> None:
    """A copy that shares blocks where the file system can.

    Not a link: who writes over the file in its place would change what is kept.
    """
    target.parent.mkdir(exist_ok=True)
    made = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(made, "wb") as write, source.open("rb") as read:
        sparse.clone(read.fileno(), write.fileno(), os.fstat(read.fileno()).st_size)


def _seal(made: Path, engine: Engine) -> None:
    for name in engine.files:
        (made / name).chmod(PROGRAM_FILE)
        sync_file(made / name)
    for directory in {(made / name).parent for name in engine.files}:
        directory.chmod(PUBLIC_DIRECTORY)
        sync_directory(directory)
    made.chmod(PUBLIC_DIRECTORY)
    write_durably(made / _MANIFEST, _encoded(engine), mode=IMMUTABLE_FILE)


def _verify(directory: Path, engine: Engine) -> None:
    for name, entry in engine.files.items():
        try:
            if describe(directory / name) == entry:
                continue
            detail = f"{directory / name} has changed"
        except OSError as error:
            detail = str(error)
        raise IncompatibleImage(_DAMAGED, detail=detail)


def _strip(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _MANIFEST:
            path.unlink()
