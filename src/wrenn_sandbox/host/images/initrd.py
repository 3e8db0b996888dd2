"""Takes the kernel out of its package and makes the first file system that it unpacks."""

import shutil
from pathlib import Path

from wrenn_sandbox.errors import HostFailure

from . import cpio
from .modules import TREES, load_order
from .recipe import KernelRecipe
from .tools import run

KERNEL_ARGS = "console=ttyS0 panic=-1 reboot=t quiet tsc=reliable nowatchdog"
"""What every guest kernel is started with.

`tsc=reliable`: else the kernel compares the counter with its timer interrupts, which come late
under emulation, gives the counter up and is left with a clock of 4 ms steps. `nowatchdog`: the
kernel would take a host that is busy for a lock-up of its own. Tried without gain on the boot time
under emulation: `mitigations=off`, `nokaslr`, `no_timer_check`.
"""

_APPLETS = (
    *("arp", "chmod", "insmod", "ip", "ln", "mkdir", "mount", "reboot", "rm", "sh"),
    *("switch_root", "usleep"),
)
_DIRECTORIES = ("bin", "dev", "modules", "modules/optional", "proc", "root", "sys")


def extract(packages_root: Path, recipe: KernelRecipe, target: Path) -> None:
    """Takes what a template needs of a kernel out of unpacked packages.

    `target` then holds `kernel`, `busybox`, `modules/` for the first file system, and below
    `lib/modules` the tree of all modules with its indexes, which is moved and not copied.
    """
    kernels = sorted(packages_root.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise HostFailure("The kernel package must hold exactly one kernel")
    release = kernels[0].name.removeprefix("vmlinuz-")
    shutil.copyfile(kernels[0], target / "kernel")
    shutil.copyfile(_first(packages_root, "bin/busybox"), target / "busybox")
    tree = _first(packages_root, f"lib/modules/{release}")
    needed = load_order(tree, recipe.modules)
    also = [entry for entry in load_order(tree, recipe.optional_modules) if entry not in needed]
    for directory, entries in ((target / "modules", needed), (target / "modules/optional", also)):
        directory.mkdir()
        for number, (name, data) in enumerate(entries):
            (directory / f"{number:02}-{name}.ko").write_bytes(data)
    (target / TREES).mkdir(parents=True)
    shutil.move(tree, target / TREES / release)
    # the package's own scripts would have done that
    run(["depmod", "--basedir", str(target), release])


def make_initrd(extracted: Path, init: Path, target: Path) -> None:
    """Writes the archive: the init script, busybox and the modules, numbered in load order.

    Not compressed: lz4 and zstd gain nothing on the boot time of a guest.
    """
    if not init.is_file():
        raise HostFailure("The guest's init script is missing from this installation")
    entries = [cpio.directory(name) for name in _DIRECTORIES]
    entries.append(cpio.file("init", init.read_bytes(), 0o755))
    entries.append(cpio.file("bin/busybox", (extracted / "busybox").read_bytes(), 0o755))
    entries += [cpio.link(f"bin/{applet}", "busybox") for applet in _APPLETS]
    for module in sorted((extracted / "modules").rglob("*.ko")):
        entries.append(cpio.file(str(module.relative_to(extracted)), module.read_bytes()))
    target.write_bytes(cpio.archive(entries))


def _first(packages_root: Path, name: str) -> Path:
    for path in (packages_root / name, packages_root / "usr" / name):
        if path.exists():
            return path
    raise HostFailure(f"The kernel's packages hold no {Path(name).name}")
