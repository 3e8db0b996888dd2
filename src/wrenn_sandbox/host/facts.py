"""Facts about this machine that `wrenn doctor` reports and choices rest on. Blocking."""

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.privileged.tap import TUN_DEVICE
from wrenn_sandbox.host.probe import cpu_model

QEMU = "qemu-system-x86_64"
TOOLS = (
    "ip",
    "nft",
    "setpriv",
    "prlimit",
    "qemu-img",
    "mmdebstrap",
    "mke2fs",
    "debugfs",
    "mkfs.erofs",
)
MB = 1024 * 1024
_FICLONE = 0x40049409  # linux/fs.h
_CLONE_NEWNET = 0x40000000
_USERFAULTFD = 323  # x86-64
_UFFD_USER_MODE_ONLY = 1


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What was found; sizes are MiB, a path or text that was not found is None or empty."""

    root: bool
    kernel: str
    cpu_model: str
    cpus: int
    memory_mb: int
    memory_available_mb: int
    disk_free_mb: int
    tun: bool
    netns: bool
    nft: bool
    userfaultfd: bool
    reflink: bool
    cgroup_v2: bool
    cgroup_controllers: tuple[str, ...]
    qemu_path: Path | None
    qemu_version: str
    tools: Mapping[str, Path | None]
    forwarding: bool
    forward_dropped: bool


def machine_facts(data_dir: Path) -> MachineFacts:
    """Find everything out; changes nothing that stays. Takes some tens of milliseconds."""
    memory = _memory()
    controllers = _cgroup_controllers()
    qemu = _tool(QEMU)
    return MachineFacts(
        root=os.geteuid() == 0,
        kernel=os.uname().release,
        cpu_model=cpu_model(),
        cpus=len(os.sched_getaffinity(0)),
        memory_mb=memory.get("MemTotal", 0),
        memory_available_mb=memory.get("MemAvailable", 0),
        disk_free_mb=shutil.disk_usage(_existing(data_dir)).free // MB,
        tun=_can_open(TUN_DEVICE),
        netns=_succeeds(["unshare", "--net", "true"]),
        nft=_succeeds(["nft", "list", "tables"]),
        userfaultfd=_userfaultfd(),
        reflink=_reflink(_existing(data_dir)),
        cgroup_v2=controllers is not None,
        cgroup_controllers=controllers or (),
        qemu_path=qemu,
        qemu_version=_qemu_version(qemu),
        tools={name: _tool(name) for name in TOOLS},
        forwarding=_forwarding(),
        forward_dropped=_forward_dropped(),
    )


def _existing(path: Path) -> Path:
    """The directory itself or the nearest one above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.is_dir())


def _tool(name: str) -> Path | None:
    found = shutil.which(name, path=ENVIRONMENT["PATH"])
    return None if found is None else Path(found)


def _output(argv: list[str]) -> str | None:
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=10, env=ENVIRONMENT, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _succeeds(argv: list[str]) -> bool:
    return _output(argv) is not None


def _can_open(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _memory(meminfo: Path = Path("/proc/meminfo")) -> dict[str, int]:
    rows = re.findall(r"^(\w+):\s+(\d+) kB$", meminfo.read_text("ascii"), re.MULTILINE)
    return {name: int(kilobytes) // 1024 for name, kilobytes in rows}


def _cgroup_controllers(root: Path = Path("/sys/fs/cgroup")) -> tuple[str, ...] | None:
    """The controllers of the unified hierarchy where it is mounted as the only one."""
    try:
        return tuple((root / "cgroup.controllers").read_text("ascii").split())
    except OSError:
        return None


def _userfaultfd(device: Path = Path("/dev/userfaultfd")) -> bool:
    if _can_open(device):
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (0, _UFFD_USER_MODE_ONLY):
        fd: int = libc.syscall(_USERFAULTFD, os.O_CLOEXEC | flags)
        if fd >= 0:
            os.close(fd)
            return True
    return False


def _reflink(directory: Path) -> bool:
    try:
        with (
            tempfile.NamedTemporaryFile(dir=directory) as source,
            tempfile.NamedTemporaryFile(dir=directory) as target,
        ):
            source.write(bytes(4096))
            source.flush()
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:
        return False
    return True


def _qemu_version(binary: Path | None) -> str:
    text = _output([str(binary), "--version"]) if binary is not None else None
    found = re.search(r"version (\d+(?:\.\d+)+)", text or "")
    return found.group(1) if found else ""


def _forwarding(sysctl: Path = Path("/proc/sys/net/ipv4")) -> bool:
    """Whether packets that come in by the default route's interface are forwarded."""
    with suppress(OSError, StopIteration):
        rows = [line.split() for line in Path("/proc/net/route").read_text("ascii").splitlines()]
        uplink = next(row[0] for row in rows[1:] if row[1] == "00000000")
        return (sysctl / "conf" / uplink / "forwarding").read_text("ascii").strip() == "1"
    return False


class _Chain(msgspec.Struct):
    table: str = ""
    name: str = ""
    hook: str = ""
    policy: str = ""


class _Entry(msgspec.Struct):
    chain: _Chain | None = None


class _Listing(msgspec.Struct):
    nftables: list[_Entry] = []


def _forward_dropped() -> bool:
    """Whether another firewall drops forwarded packets unless it knows them (Docker does)."""
    text = _output(["nft", "-j", "list", "chains"])
    if text is None:
        return False
    try:
        listing = msgspec.json.decode(text, type=_Listing)
    except msgspec.DecodeError:
        return False
    return any(
        entry.chain is not None and entry.chain.hook == "forward" and entry.chain.policy == "drop"
        for entry in listing.nftables
    )
