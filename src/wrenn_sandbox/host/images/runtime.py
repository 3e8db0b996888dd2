"""Makes the runtime image: the guest agent, its interpreter and their libraries, read-only.

Layout of the image, mounted at `/run/.wrenn` in a guest:

    bin/python3             the interpreter
    lib/ld-linux-x86-64.so.2, lib/*.so.*    its loader and every library it needs
    lib/python3.N/          the standard library, compiled, without sources
    agent/                  the agent: main.py, wrenn_agent/ (compiled)
    bin/modprobe            a static busybox, which the guest's kernel loads modules with
    modules/RELEASE/        all modules of the guest's kernel with their indexes
    template.json           the defaults of a template that was made of an OCI image

Nothing is compiled or looked up outside the image when the agent starts. The modules alone are
compressed: they are many and seldom read.
"""

import os
import shutil
import stat
from pathlib import Path

import msgspec

from wrenn_sandbox.errors import HostFailure

from .manifest import Defaults
from .packages import EPOCH
from .tools import run

LOADER = "ld-linux-x86-64.so.2"
_MODULES = "modules"
_DEFAULTS = "template.json"
_UUID = "5d9a1c0e-7d55-4b7c-9f6e-0f1b8f0f6c2d"
_LIBRARY_DIRS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")

_EXTENSIONS = frozenset(
    (
        *("_asyncio", "_contextvars", "_ctypes", "_json", "_queue", "_typing"),
        *("mmap", "resource", "termios"),
    )
)
"""Extension modules that go in. Not `_ssl` and `_hashlib`: the agent speaks no TLS, the hashes it
uses are built in, and loading OpenSSL would be the slowest part of the agent's start."""

_LEFT_OUT = frozenset(
    (
        *("__phello__", "curses", "dbm", "distutils", "ensurepip", "idlelib", "lib-dynload"),
        *("lib2to3", "pydoc_data", "sqlite3", "test", "tkinter", "turtledemo", "unittest"),
        *("venv", "wsgiref", "xml", "xmlrpc"),
    )
)

_COMPILE = """
import os, py_compile, sys
optimize = int(sys.argv[1])
for root in sys.argv[2:]:
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                source = os.path.join(directory, name)
                py_compile.compile(source, source + "c", os.path.relpath(source, root), True,
                                   optimize, py_compile.PycInvalidationMode.UNCHECKED_HASH)
                os.unlink(source)
"""


def make_base(packages_root: Path, target: Path) -> None:
    """Fills `target` with interpreter, libraries and standard library from unpacked packages."""
    version = _python_version(packages_root)
    libraries = target / "lib"
    stdlib = libraries / version
    (target / "bin").mkdir(parents=True)
    libraries.mkdir()
    shutil.copy2(packages_root / "usr/bin" / version, target / "bin/python3")
    shutil.copytree(
        packages_root / "usr/lib" / version,
        stdlib,
        ignore=lambda directory, names: [n for n in names if _is_left_out(Path(directory, n))],
    )
    dynload = stdlib / "lib-dynload"
    dynload.mkdir()
    for extension in (packages_root / "usr/lib" / version / "lib-dynload").iterdir():
        if extension.name.partition(".")[0] in _EXTENSIONS:
            shutil.copy2(extension, dynload)
    _copy_libraries(packages_root, target, [target / "bin/python3", *dynload.iterdir()])
    _compile(target, stdlib, optimize=2)


def add_agent(base: Path, agent: Path, target: Path) -> None:
    """Makes `target` the complete tree: `base` and the agent's sources, its package compiled."""
    if not (agent / "main.py").is_file():
        raise HostFailure("The guest agent's sources are missing from this installation")
    shutil.copytree(base, target, symlinks=True, copy_function=os.link)
    shutil.copytree(
        agent, target / "agent", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    )
    main = target / "agent/main.py"
    kept = main.read_bytes()
    _compile(target, target / "agent", optimize=0)
    main.with_suffix(".pyc").unlink()
    main.write_bytes(kept)


def add_modules(trees: Path, busybox: Path, tree: Path) -> None:
    """Adds the kernel's modules and the program that loads them to a runtime tree."""
    shutil.copytree(trees, tree / _MODULES, symlinks=True, copy_function=os.link)
    shutil.copyfile(busybox, tree / "bin/modprobe")
    (tree / "bin/modprobe").chmod(0o755)


def add_defaults(defaults: Defaults, tree: Path) -> None:
    """Adds what the guest agent is to know of the template to a runtime tree."""
    (tree / _DEFAULTS).write_bytes(msgspec.json.encode(defaults, order="deterministic"))


def _is_left_out(path: Path) -> bool:
    """Also links with an absolute target, which are followed to files of this host."""
    leads_out = path.is_symlink() and path.readlink().is_absolute()
    return leads_out or path.name in _LEFT_OUT or path.name.startswith("config-")


def _python_version(packages_root: Path) -> str:
    found = sorted((packages_root / "usr/lib").glob("python3.*"))
    if len(found) != 1:
        raise HostFailure("The runtime packages must hold exactly one Python 3")
    return found[0].name


def _copy_libraries(packages_root: Path, target: Path, programs: list[Path]) -> None:
    directories = [packages_root / name for name in _LIBRARY_DIRS]
    loader = next((d / LOADER for d in directories if (d / LOADER).exists()), None)
    if loader is None:
        raise HostFailure("The runtime packages hold no loader")
    shutil.copy2(loader.resolve(), target / "lib" / LOADER)
    search = ":".join(str(directory) for directory in directories)
    for program in programs:
        listing = run(
            [
                *(str(target / "lib" / LOADER), "--inhibit-cache"),
                *("--library-path", search, "--list", str(program)),
            ]
        )
        for line in listing.decode().splitlines():
            name, arrow, found = line.strip().partition(" => ")
            destination = target / "lib" / name
            if arrow and not destination.exists():
                shutil.copy2(Path(found.rpartition(" (")[0]).resolve(), destination)


def _compile(target: Path, tree: Path, *, optimize: int) -> None:
    """Replaces every source of `tree` by what the image's own interpreter compiles it to."""
    run(
        [*interpreter(target), "-c", _COMPILE, str(optimize), str(tree)],
        env={"PYTHONHASHSEED": "0"},
    )


def interpreter(target: Path) -> list[str]:
    """The command that starts the interpreter of a runtime tree, wherever the tree lies."""
    return [
        str(target / "lib" / LOADER),
        "--inhibit-cache",
        "--library-path",
        str(target / "lib"),
        str(target / "bin/python3"),
        *("-I", "-S", "-B", "-X", "utf8"),
    ]


def make_image(tree: Path, target: Path) -> None:
    """Packs a runtime tree into a read-only erofs image, bit by bit the same each time.

    Modes become 0755 or 0644: those of the tree depend on who checked it out.
    """
    for path in [tree, *tree.rglob("*")]:
        runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
        path.chmod(0o755 if runs else 0o644)
    hints = tree.with_name(tree.name + ".hints")
    as_they_are = sorted(path.name for path in tree.iterdir() if path.name != _MODULES)
    hints.write_text("".join(f"0 ^{name}/\n" for name in as_they_are))
    run(
        [
            *("mkfs.erofs", "-T", str(EPOCH), "-U", _UUID, "--all-root", "-x", "-1"),
            *("-z", "lz4", f"--compress-hints={hints}"),
            *(str(target), str(tree)),
        ]
    )
