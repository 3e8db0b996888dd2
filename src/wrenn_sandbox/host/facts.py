"""Facts about this machine that `wrenn doctor` reports and choices rest on. Blocking."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.memory import sparse
from wrenn_sandbox.host.network.rules import limits_alone, shape_of
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.privileged.confinement import jail_obstacle
from wrenn_sandbox.host.privileged.tap import TUN_DEVICE
from wrenn_sandbox.host.vmm.firecracker import binary as firecracker_binary
from wrenn_sandbox.host.vmm.qemu.binary import has_seccomp, vendor, version_of
from wrenn_sandbox.host.vmm.qemu.command import BINARY, Program
from wrenn_sandbox.host.vmm.qemu.cpu_models import offered
from wrenn_sandbox.patience import patience

from .admission import measure
from .privileged import cgroups
from .probe import cpu_model

TOOLS = (
    "ip",
    "nft",
    "tc",
    "mmdebstrap",
    "mke2fs",
    "debugfs",
    "mkfs.erofs",
    "depmod",
)
IMAGE_TOOLS = ("skopeo", "umoci")
"""For templates of OCI images."""
_APART = ("unshare", "--net")


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
    connection_limits: bool
    bandwidth_limits: bool
    cgroup_v2: bool
    cgroup_controllers: tuple[str, ...]
    """Those of `cgroups.CONTROLLERS` that machines can be bounded by."""
    jail_obstacle: str
    """Why a monitor cannot be locked up."""
    sealed_memory: bool
    """Memory that nobody can write to any more."""
    qemu_path: Path | None
    qemu_version: str
    qemu_seccomp: bool
    firecracker: str
    """Path, version and digest of the Firecracker here; empty where none is usable."""
    firecracker_obstacle: str
    """What is wrong with the one that is named or found; empty where there is none."""
    shares_blocks: bool
    """Copies of files in the data directory share blocks with what they are of."""
    cpu_vendor: str
    cpu_models: Mapping[str, tuple[str, ...]]
    """By accelerator, the models that guests can have."""
    tools: Mapping[str, Path | None]
    image_tools: Mapping[str, Path | None]
    forwarding: bool
    forward_dropped: bool


def machine_facts(data_dir: Path, firecracker: Path | None = None) -> MachineFacts:
    """Find everything out; changes nothing that stays. Takes some tens of milliseconds.

    `firecracker` is the binary that the settings name.
    """
    found, obstacle = _firecracker(firecracker)
    free = measure(_existing(data_dir))
    hierarchy = cgroups.hierarchy()
    qemu = _tool(BINARY)
    return MachineFacts(
        root=os.geteuid() == 0,
        kernel=os.uname().release,
        cpu_model=cpu_model(),
        cpus=len(os.sched_getaffinity(0)),
        memory_mb=free.memory_total_mb,
        memory_available_mb=free.memory_free_mb,
        disk_free_mb=free.disk_free_mb,
        tun=_can_open(TUN_DEVICE),
        netns=_succeeds(["unshare", "--net", "true"]),
        nft=_succeeds(["nft", "list", "tables"]),
        connection_limits=_succeeds([*_APART, "nft", "-f", "-"], limits_alone()),
        bandwidth_limits=_succeeds([*_APART, "tc", "-batch", "-"], shape_of("lo", 1) + "\n"),
        cgroup_v2=hierarchy is not None,
        cgroup_controllers=cgroups.usable(hierarchy),
        jail_obstacle=jail_obstacle(("true",)),
        sealed_memory=_sealed_memory(),
        qemu_path=qemu,
        qemu_version=_qemu_version(qemu),
        qemu_seccomp=qemu is not None and has_seccomp(Program((str(qemu),))),
        firecracker=found,
        firecracker_obstacle=obstacle,
        shares_blocks=_shares_blocks(_existing(data_dir)),
        cpu_vendor=vendor(),
        cpu_models={each: offered(str(qemu), each) if qemu else () for each in ("kvm", "tcg")},
        tools={name: _tool(name) for name in TOOLS},
        image_tools={name: _tool(name) for name in IMAGE_TOOLS},
        forwarding=_forwarding(),
        forward_dropped=_forward_dropped(),
    )


def _existing(path: Path) -> Path:
    """The directory itself or the nearest one above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.is_dir())


def _tool(name: str) -> Path | None:
    found = shutil.which(name, path=ENVIRONMENT["PATH"])
    return None if found is None else Path(found)


def _output(argv: list[str], text: str = "") -> str | None:
    try:
        done = subprocess.run(
            argv,
            input=text,
            capture_output=True,
            timeout=patience(10),
            env=ENVIRONMENT,
            check=False,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _succeeds(argv: list[str], text: str = "") -> bool:
    return _output(argv, text) is not None


def _can_open(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _sealed_memory() -> bool:
    try:
        fd = os.memfd_create("wrenn-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _qemu_version(binary: Path | None) -> str:
    with suppress(HostFailure):
        return "" if binary is None else ".".join(map(str, version_of(Program((str(binary),)))))
    return ""


def _firecracker(named: Path | None) -> tuple[str, str]:
    """What it is, and what is wrong with it; both are empty where there is none."""
    path = firecracker_binary.found(named)
    if path is None:
        return "", "" if named is None else f"there is no {named}"
    try:
        version = firecracker_binary.require_usable(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (HostFailure, OSError) as error:
        return "", f"{path}: {error}"
    return f"{path} {version} (SHA-256 {digest[:12]})", ""


def _shares_blocks(directory: Path) -> bool:
    try:
        with (
            tempfile.TemporaryFile(dir=directory) as one,
            tempfile.TemporaryFile(dir=directory) as other,
        ):
            one.write(b"x")
            one.flush()
            return sparse.shared(one.fileno(), other.fileno())
    except OSError:
        return False


def _forwarding(sysctl: Path = Path("/proc/sys/net/ipv4")) -> bool:
    """Whether packets that come in by the default route's interface are forwarded."""
    with suppress(OSError, StopIteration):
        rows = [line.split() for line in Path("/proc/net/route").read_text("ascii").splitlines()]
        uplink = next(row[0] for row in rows[1:] if row[1] == "00000000")
        return (sysctl / "conf" / uplink / "forwarding").read_text("ascii").strip() == "1"
    return False


def _forward_dropped() -> bool:
    """Whether another firewall drops forwarded packets unless it knows them (Docker does)."""
    chains = _output(["nft", "list", "chains"]) or ""
    return re.search(r"\bhook forward\b.*\bpolicy drop;", chains) is not None
