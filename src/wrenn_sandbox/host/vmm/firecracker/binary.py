"""The Firecracker of this host: which one it is, and the engine that it is kept as. Blocks."""

import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.engines import Engine, EngineStore
from wrenn_sandbox.host.paths import write_durably
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.probe import KvmVerdict
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import HostSettings

VMM: Final = "firecracker"
BINARY: Final = "firecracker"
OLDEST: Final = (1, 13, 0)
"""Older ones read the guest's memory while they load a snapshot (seen: queues of the network), and
have no answer for what is missing in it."""
TRIED: Final = "1.14.4"
"""The versions with which all tests have passed."""
_VERSION: Final = re.compile(rb"^Firecracker v(\d+)\.(\d+)\.(\d+)\S*$", re.MULTILINE)
_HEADER: Final = struct.Struct("<4sBB10x16xQ14xHH")
"""Of a 64-bit ELF file: magic number, class, byte order, and where how many segments of which size
are (elf(5))."""
_SEGMENT: Final = struct.Struct("<I")
_INTERPRETER: Final = 3


@dataclass(frozen=True)
class Firecracker:
    """One of the Firecrackers that are kept on this host."""

    version: str
    digest: str
    directory: Path

    @property
    def program(self) -> Path:
        """What is started."""
        return self.directory / BINARY

    @classmethod
    def of(cls, engines: EngineStore, engine: Engine) -> "Firecracker":
        """An engine of this kind; raises `HostFailure` for one of another."""
        if engine.vmm != VMM:
            raise HostFailure(f"{engine.title} is no Firecracker")
        return cls(engine.vmm_version, engine.digest, engines.directory(engine.digest))


def found(named: Path | None) -> Path | None:
    """The binary that the settings name, else the one on the path; None where there is neither.

    Absolute, since it is started in other directories.
    """
    if named is not None:
        return named.resolve() if named.is_file() else None
    path = shutil.which(BINARY, path=ENVIRONMENT["PATH"])
    return None if path is None else Path(path)


def installed(engines: EngineStore, note: Path, named: Path | None) -> Firecracker:
    """The binary of this host, kept as an engine; `note` says which one from now on.

    Raises OSError, and `HostFailure` where there is none that can be used.
    """
    binary = found(named)
    if binary is None:
        raise HostFailure("There is no Firecracker here; WRENN_FIRECRACKER names its binary")
    version = require_usable(binary)
    engine = engines.keep(VMM, version, {BINARY: binary})
    if engine.retired_at is not None:
        raise HostFailure(
            f"{engine.title}, which is installed, was retired on this host; install another one",
            detail=engine.digest,
        )
    write_durably(note, msgspec.json.encode({"engine": engine.digest, "binary": str(binary)}))
    return Firecracker.of(engines, engine)


def host_obstacle(settings: HostSettings, *, slots: bool, kvm: KvmVerdict | None = None) -> str:
    """Why no VM of Firecracker runs on a host, whatever its binary; empty if one does.

    `slots` says whether VMs get network slots with taps. Without a verdict on KVM it is taken to
    work.
    """
    if settings.accelerator == "tcg":
        return "it needs KVM, and WRENN_ACCELERATOR is tcg"
    if settings.cpu_model not in ("auto", "host"):
        return "its guests get the host's processor, and WRENN_CPU_MODEL names another"
    if not slots:
        return "it needs network slots with taps; see `wrenn doctor`"
    return "" if kvm is None or kvm.usable else f"KVM is not usable: {kvm.reason}"


def require_usable(binary: Path) -> str:
    """The version of a binary, such as `1.14.4`; raises `HostFailure` for one that is of no use."""
    numbers = _version(binary)
    version = ".".join(map(str, numbers))
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST[:2]))
        raise HostFailure(f"Firecracker {version} is too old; {oldest} or later is needed")
    if not _is_static(binary):
        raise HostFailure(
            "This Firecracker needs libraries of the host, so it cannot be kept for what it stores"
            " and has no seccomp filter; install a released binary"
        )
    return version


def _version(binary: Path) -> tuple[int, int, int]:
    argv = [str(binary), "--version"]
    try:
        done = subprocess.run(
            argv, capture_output=True, check=True, env=ENVIRONMENT, timeout=patience(10)
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostFailure("Firecracker does not run here", detail=str(error)) from error
    match = _VERSION.search(done.stdout)
    if match is None:
        detail = repr(done.stdout[:200])
        raise HostFailure("Firecracker did not report its version", detail=detail)
    major, minor, micro = map(int, match.groups())
    return major, minor, micro


def _is_static(binary: Path) -> bool:
    with open(binary, "rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return False
        magic, bits, order, offset, size, count = _HEADER.unpack(head)
        if (magic, bits, order) != (b"\x7fELF", 2, 1):
            return False
        for number in range(count):
            kind = os.pread(file.fileno(), _SEGMENT.size, offset + number * size)
            if kind == _SEGMENT.pack(_INTERPRETER):
                return False
    return True
