"""What the QEMU of this host consists of, and how it is started from where it is kept. Blocks.

loader                what the program names as its interpreter; none of a static one
qemu-system-x86_64    the program
lib/                  the libraries that it is linked to, by the names that it asks for
modules/              the parts that it loads itself, such as TCG
firmware/             what guests start with
"""

import contextlib
import os
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.errors import HostFailure, IncompatibleImage, NotFound
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.host.engines import Engine, EngineStore
from wrenn_sandbox.host.paths import write_durably
from wrenn_sandbox.patience import patience

from .binary import version_of
from .command import BINARY, MACHINE, Program

VMM: Final = "qemu"
_LOADER: Final = "loader"
_LIBRARIES: Final = "lib"
_MODULES: Final = "modules"
_FIRMWARE: Final = "firmware"
_ROMS: Final = ("bios-microvm.bin", "qboot.rom")
"""All that a `microvm` without option ROMs reads (seen by strace)."""
_TRIAL_SEC: Final = 30.0
_ASK: Final = b'{"execute": "qmp_capabilities"}\n'
_ANSWER: Final = b'{"return"'
_DEPENDENCY: Final = re.compile(rb"^\s*(\S+) => (.+?)(?: \(0x[0-9a-f]+\))?$", re.MULTILINE)
_MODULE: Final = re.compile(r"\.so$")
_LIBRARY: Final = re.compile(r"\.so\.")
_NOT_KEPT: Final = "The QEMU of this host cannot be kept for what it stores"


class _Source(msgspec.Struct, frozen=True):
    """A file of the installed QEMU, as it was when it was kept."""

    path: str
    facts: tuple[int, ...]


class _Note(msgspec.Struct, frozen=True):
    """Which engine these files were kept as."""

    engine: str
    binary: str
    sources: tuple[_Source, ...]


def installed(engines: EngineStore, note: Path) -> Engine:
    """The QEMU that is installed, as it is kept; it is kept first unless `note` says it is.

    Raises OSError, `HostFailure` where there is none and `IncompatibleImage` where it is retired.
    """
    binary = shutil.which(BINARY)
    if binary is None:
        raise HostFailure(f"{BINARY} is not installed; run `wrenn doctor`")
    engine = _noted(engines, note, binary)
    if engine is None:
        engine = _kept(engines, note, binary)
    if engine.retired_at is not None:
        raise HostFailure(
            f"{engine.title}, which is installed, was retired on this host; install another QEMU",
            detail=engine.digest,
        )
    return engine


def _noted(engines: EngineStore, note: Path, binary: str) -> Engine | None:
    try:
        noted = msgspec.json.decode(note.read_bytes(), type=_Note)
        if noted.binary == binary and all(_source(Path(e.path)) == e for e in noted.sources):
            engine = engines.open(noted.engine)
            return engine if engine.retired_at is not None else engines.sound(noted.engine)
    except (OSError, msgspec.DecodeError, NotFound, IncompatibleImage):
        pass
    return None


def _kept(engines: EngineStore, note: Path, binary: str) -> Engine:
    files = constituents(binary)
    before = tuple(map(_source, files.values()))
    version = ".".join(map(str, version_of(Program((binary,)))))
    engine = engines.keep(VMM, version, files)
    if tuple(map(_source, files.values())) != before:
        raise HostFailure("QEMU is being replaced on this host; start again")
    noted = _Note(engine.digest, binary, before)
    write_durably(note, msgspec.json.encode(noted))
    failpoints.reach("engine.noted")
    return engine


def _source(path: Path) -> _Source:
    found = path.stat()
    numbers = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return _Source(str(path), numbers)


def program(directory: Path, engine: Engine) -> Program:
    """How a kept QEMU is started: by its own loader, with its own libraries and firmware."""
    argv = [str(directory / BINARY)]
    if _LOADER in engine.files:
        argv = [str(directory / _LOADER), "--library-path", str(directory / _LIBRARIES), *argv]
    argv += ["-L", str(directory / _FIRMWARE)]
    return Program(tuple(argv), {"QEMU_MODULE_DIR": str(directory / _MODULES)})


def constituents(binary: str) -> Mapping[str, Path]:
    """The files of a QEMU by their names in an engine; raises OSError and `HostFailure`."""
    executable, mapped = _loaded(binary)
    loader = _interpreter(executable)
    found: dict[str, Path] = {BINARY: executable}
    if loader is not None:
        found[_LOADER] = loader.resolve()
        libraries = _dependencies(loader, executable)
        known = {executable, loader.resolve(), *libraries.values()}
        for path in sorted(mapped - known):
            if _MODULE.search(path.name):
                found[f"{_MODULES}/{path.name}"] = path
                libraries = {**_dependencies(loader, path), **libraries}
            elif _LIBRARY.search(path.name) and path not in libraries.values():
                libraries.setdefault(path.name, path)
        found |= {f"{_LIBRARIES}/{name}": path for name, path in libraries.items()}
    directories = [Path(os.fsdecode(each)) for each in _output([binary, "-L", "help"]).split(b"\n")]
    for name in _ROMS:
        if (rom := _first(each / name for each in directories)) is not None:
            found[f"{_FIRMWARE}/{name}"] = rom.resolve()
    return found


def _loaded(binary: str) -> tuple[Path, set[Path]]:
    """The executable of a QEMU with a machine, and the files that it has mapped then.

    Its greeting can come before it has a machine; it answers when it has one.
    """
    argv = [binary, "-M", MACHINE, "-accel", "tcg", "-accel", "kvm", "-m", "16", "-S"]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as child:
        deadline = threading.Timer(patience(_TRIAL_SEC), child.kill)
        deadline.start()
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(_ASK)
            if not any(line.startswith(_ANSWER) for line in child.stdout):
                raise HostFailure(_NOT_KEPT, detail=f"{binary} starts no machine")
            executable = Path(os.readlink(f"/proc/{child.pid}/exe"))
            maps = Path(f"/proc/{child.pid}/maps").read_text("utf-8", "surrogateescape")
        finally:
            deadline.cancel()
            child.kill()
    columns = (line.split(maxsplit=5) for line in maps.splitlines())
    return executable, {Path(each[5]) for each in columns if len(each) == 6 and each[5][0] == "/"}


def _dependencies(loader: Path, file: Path) -> dict[str, Path]:
    """The libraries that the loader finds for a program or library, by the names asked for."""
    found = {}
    for name, path in _DEPENDENCY.findall(_output([str(loader), "--list", str(file)])):
        if not path.startswith(b"/"):
            raise HostFailure(_NOT_KEPT, detail=f"{file}: {os.fsdecode(name)} is missing")
        found[Path(os.fsdecode(name)).name] = Path(os.fsdecode(path)).resolve()
    return found


_HEADER: Final = struct.Struct("<4sBB10x16xQ14xHH")
"""Of a 64-bit ELF file: magic number, class, byte order, and where how many segments of which size
are (elf(5))."""
_SEGMENT: Final = struct.Struct("<I4xQ16xQ")
_INTERPRETER: Final = 3


def _interpreter(program: Path) -> Path | None:
    """What a program names as its loader; None of a static one."""
    with program.open("rb") as file:
        magic, bits, order, offset, size, count = _HEADER.unpack(file.read(_HEADER.size))
        if (magic, bits, order) != (b"\x7fELF", 2, 1):
            raise HostFailure(_NOT_KEPT, detail=f"{program} is no 64-bit ELF program")
        for number in range(count):
            file.seek(offset + number * size)
            kind, start, length = _SEGMENT.unpack(file.read(_SEGMENT.size))
            if kind == _INTERPRETER:
                file.seek(start)
                return Path(os.fsdecode(file.read(length).rstrip(b"\0")))
    return None


def _first(paths: Iterable[Path]) -> Path | None:
    return next((each for each in paths if each.is_file()), None)


def _output(argv: list[str]) -> bytes:
    try:
        done = subprocess.run(argv, capture_output=True, check=True, timeout=patience(_TRIAL_SEC))
    except subprocess.SubprocessError as error:
        raise HostFailure(_NOT_KEPT, detail=str(error)) from error
    return done.stdout
