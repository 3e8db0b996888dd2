"""`wrenn doctor`: what this machine can do for sandboxes, and what to do about the rest."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import typer

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.host.facts import MachineFacts, machine_facts
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.probe import KvmVerdict, kvm_verdict, probe_kvm
from wrenn_sandbox.host.vmm.firecracker.binary import OLDEST, TRIED, host_obstacle
from wrenn_sandbox.host.vmm.qemu.command import BINARY, READ_ONLY_BASE_SINCE
from wrenn_sandbox.host.vmm.qemu.kvm import tried
from wrenn_sandbox.settings import HostSettings

Status = Literal["ok", "warn", "missing"]

_USUAL_MEMORY_MB: Final = 512
"""Of a sandbox of the default template."""

_BOUNDED: Final = {
    "memory": ("memory", "only its address space bounds the memory that a monitor takes"),
    "cpu": ("processor time", "nothing bounds the processor time that a monitor takes"),
    "pids": ("number of threads", "only a limit of its user's bounds the threads of a monitor"),
}
"""For each controller what it bounds, and what is so without it."""


class CpuOffer(msgspec.Struct, frozen=True):
    """The processors that guests can have, the best first."""

    accelerator: str
    vendor: str
    models: tuple[str, ...]


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finding. `missing` means that sandboxes cannot run, `warn` that they run with less."""

    name: str
    status: Status
    detail: str
    advice: str = ""
    cpu: CpuOffer | None = None


def examine(facts: MachineFacts, kvm: KvmVerdict, settings: HostSettings) -> list[Line]:
    """Judge the facts. Pure."""
    memory_needed = settings.memory_reserve_mb + (settings.default_memory_mb or _USUAL_MEMORY_MB)
    return [
        _line(
            "kvm",
            kvm.usable,
            kvm.reason,
            f"not usable: {kvm.reason}; machines run in software (TCG), slower",
            "use hardware or a cloud instance with (nested) virtualisation to run at full speed",
        ),
        _line(
            "qemu",
            facts.qemu_path is not None and bool(facts.qemu_version),
            f"{facts.qemu_path} {facts.qemu_version}",
            f"no working {BINARY}",
            "install the package qemu-system-x86",
            "missing",
        ),
        *_firecracker(facts, kvm, settings),
        _cpu(facts, kvm, settings),
        *_network(facts, required=settings.network == "tap"),
        *_guest_limits(facts, settings),
        _tools(facts),
        _image_tools(facts),
        _line(
            "disk",
            facts.disk_free_mb > settings.disk_reserve_mb,
            f"{_size(facts.disk_free_mb)} free at the data directory",
            f"only {_size(facts.disk_free_mb)} free, and"
            f" {_size(settings.disk_reserve_mb)} are kept in reserve",
            "free space, or set WRENN_DATA_DIR to a bigger disk",
            "missing",
        ),
        _line(
            "memory",
            facts.memory_available_mb >= memory_needed,
            f"{_size(facts.memory_available_mb)} of {_size(facts.memory_mb)} available",
            f"only {_size(facts.memory_available_mb)} available of the"
            f" {_size(memory_needed)} for one machine",
            "free memory, or lower WRENN_DEFAULT_MEMORY_MB or WRENN_MEMORY_RESERVE_MB",
            "missing",
        ),
        *_confinement(facts, settings),
        Line("kernel", "ok", f"Linux {facts.kernel} on {facts.cpus} x {facts.cpu_model}"),
    ]


def _firecracker(facts: MachineFacts, kvm: KvmVerdict, settings: HostSettings) -> list[Line]:
    """What there is of it, and what its disks cost: they have no layers."""
    asked = settings.driver == "firecracker"
    if not facts.firecracker:
        if not asked and not facts.firecracker_obstacle:
            return [Line("firecracker", "ok", "not installed; machines run in QEMU")]
        return [
            Line(
                "firecracker",
                "missing" if asked else "warn",
                facts.firecracker_obstacle or "not installed",
                f"name a released binary of version {OLDEST[0]}.{OLDEST[1]} or later in"
                " WRENN_FIRECRACKER, or set WRENN_DRIVER to qemu",
            )
        ]
    if obstacle := host_obstacle(settings, slots=_slots(facts, settings), kvm=kvm):
        unused = f"{facts.firecracker} cannot be used: {obstacle}"
        if not asked:
            return [Line("firecracker", "ok", f"{unused}; machines run in QEMU")]
        return [Line("firecracker", "missing", unused, "set WRENN_DRIVER to qemu")]
    line = Line("firecracker", "ok", f"{facts.firecracker}; version {TRIED} was tried")
    if settings.driver not in ("auto", "firecracker"):
        return [line]
    return [
        line,
        _line(
            "disk copies",
            facts.shares_blocks,
            "the disk of each machine shares blocks with its template's",
            "each start under Firecracker copies all that the template's disk holds",
            "put the data directory on a file system that can share blocks: XFS or Btrfs",
        ),
    ]


def _cpu(facts: MachineFacts, kvm: KvmVerdict, settings: HostSettings) -> Line:
    accelerator = "kvm" if kvm.usable and settings.accelerator != "tcg" else "tcg"
    models = facts.cpu_models[accelerator]
    offer = CpuOffer(accelerator, facts.cpu_vendor, models)
    usual, wanted = ("max", "host" if accelerator == "kvm" else "max"), settings.cpu_model
    if wanted == "auto" or wanted in (*usual, *models):
        used = (accelerator == "kvm" and kvm.cpu) or usual[1] if wanted == "auto" else wanted
        named = f"; of {len(models)} named models {models[0]} has most" if models else ""
        return Line("cpu", "ok", f"guests get {used} under {accelerator}{named}", cpu=offer)
    return Line(
        "cpu",
        "missing",
        f"this host cannot give guests a {wanted} under {accelerator}",
        f"set WRENN_CPU_MODEL to auto or one of {', '.join(models) or 'no other'}",
        offer,
    )


def common(reports: Sequence[Path]) -> bool:
    """Print the CPU models that guests can have on all hosts that have written these reports.

    Returns whether there is any; raises `InvalidRequest` for what is no report.
    """
    offers = [_offer(path) for path in reports]
    kinds = {
        (each.accelerator, each.vendor if each.accelerator == "kvm" else "") for each in offers
    }
    if len(kinds) > 1:
        typer.echo("these hosts have no CPU model in common: other accelerators or vendors")
        return False
    models = [name for name in offers[0].models if all(name in each.models for each in offers)]
    if not models:
        typer.echo("these hosts have no CPU model in common")
        return False
    typer.echo(f"WRENN_CPU_MODEL={models[0]}")
    typer.echo(f"in common, the best first: {', '.join(models)}")
    return True


def _offer(path: Path) -> CpuOffer:
    try:
        lines = msgspec.json.decode(path.read_bytes(), type=list[Line])
        return next(each.cpu for each in lines if each.cpu is not None)
    except (OSError, msgspec.DecodeError, StopIteration) as error:
        raise InvalidRequest(f"{path} is no report of `wrenn doctor --json`") from error


def healthy(lines: Sequence[Line]) -> bool:
    """Whether sandboxes can run."""
    return all(line.status != "missing" for line in lines)


def report(json: bool) -> bool:
    """Print what this machine can do, and return whether sandboxes can run on it."""
    settings = HostSettings()
    verdict = asyncio.run(_verdict(settings))
    facts = machine_facts(settings.data_dir, settings.firecracker)
    lines = examine(facts, verdict, settings)
    if json:
        typer.echo(msgspec.json.encode(lines))
    else:
        for line in lines:
            typer.echo(f"{line.status:8}{line.name:15}{line.detail}")
            if line.advice:
                typer.echo(f"{'':23}-> {line.advice}")
    return healthy(lines)


async def _verdict(settings: HostSettings) -> KvmVerdict:
    if os.access(settings.data_dir, os.W_OK):
        probed = await kvm_verdict(Paths(settings.data_dir).probe_verdict)
    else:
        probed = await probe_kvm()
    return await asyncio.to_thread(tried, probed, BINARY)


def _line(name: str, good: bool, yes: str, no: str, advice: str, bad: Status = "warn") -> Line:
    return Line(name, "ok", yes) if good else Line(name, bad, no, advice)


def _network(facts: MachineFacts, *, required: bool) -> list[Line]:
    bad: Status = "missing" if required else "warn"
    fallback = "" if required else "; user-mode networking instead, without internet"
    checks: list[tuple[str, bool, str, str]] = [
        ("root", facts.root, "runs as root", "run the server as root"),
        ("tun", facts.tun, "/dev/net/tun opens", "load the module tun and allow /dev/net/tun"),
        (
            "namespaces",
            facts.netns,
            "network namespaces can be made",
            "run as root on a kernel with CONFIG_NET_NS",
        ),
        (
            "nftables",
            facts.nft,
            "rules can be set",
            "install the package nftables and run as root on a kernel with CONFIG_NF_TABLES",
        ),
    ]
    lines = [
        _line(name, good, yes, f"not so: {yes}{fallback}", advice, bad)
        for name, good, yes, advice in checks
    ]
    return [*lines, _forwarding(facts, slots=all(good for _, good, _, _ in checks))]


def _guest_limits(facts: MachineFacts, settings: HostSettings) -> list[Line]:
    """What one guest takes of this machine's network; rules that the kernel lacks make no slot."""
    connections = settings.guest_connections or settings.guest_connections_per_sec
    if not _slots(facts, settings):
        return []
    return [
        _line(
            "connections",
            facts.connection_limits,
            "the connections of each guest can be bounded",
            "this kernel cannot bound the connections of a guest",
            "use a kernel with CONFIG_NFT_CONNLIMIT and CONFIG_NFT_LIMIT, or set"
            " WRENN_GUEST_CONNECTIONS and WRENN_GUEST_CONNECTIONS_PER_SEC to 0",
            "missing" if connections else "warn",
        ),
        _line(
            "bandwidth",
            facts.bandwidth_limits,
            "the bandwidth of each guest can be bounded",
            "this kernel cannot bound the bandwidth of a guest",
            "use a kernel with CONFIG_NET_SCH_TBF, or set WRENN_GUEST_MBIT_PER_SEC to 0",
            "missing" if settings.guest_mbit_per_sec else "warn",
        ),
    ]


def _slots(facts: MachineFacts, settings: HostSettings) -> bool:
    """Whether machines get network slots of their own."""
    return facts.root and facts.tun and facts.netns and facts.nft and settings.network != "user"


def _forwarding(facts: MachineFacts, *, slots: bool) -> Line:
    if not slots:
        return Line(
            "forwarding",
            "warn",
            "guests have no internet with user-mode networking",
            "see the lines above",
        )
    if facts.forward_dropped:
        return Line(
            "forwarding",
            "warn",
            "another firewall of this machine drops forwarded packets by default",
            "let it accept packets from and to the interfaces wrn*",
        )
    if facts.forwarding:
        return Line("forwarding", "ok", "packets of guests are forwarded to the internet")
    return Line("forwarding", "ok", "off now; the server turns it on for the default interface")


def _tools(facts: MachineFacts) -> Line:
    absent = sorted(name for name, path in facts.tools.items() if path is None)
    if not absent:
        return Line("tools", "ok", ", ".join(facts.tools))
    return Line(
        "tools",
        "warn",
        "not installed: " + ", ".join(absent),
        "install the packages iproute2, nftables, mmdebstrap, e2fsprogs, erofs-utils and kmod",
    )


def _image_tools(facts: MachineFacts) -> Line:
    """None of it is needed but for templates of OCI images."""
    absent = sorted(name for name, path in facts.image_tools.items() if path is None)
    if not absent:
        return Line("image tools", "ok", ", ".join(facts.image_tools))
    names = ", ".join(absent)
    return Line(
        "image tools", "ok", f"not installed: {names}; only templates of OCI images need these"
    )


def _confinement(facts: MachineFacts, settings: HostSettings) -> list[Line]:
    """What holds a monitor that its guest has taken over."""
    version = tuple(int(part) for part in facts.qemu_version.split(".") if part)
    read_only = version >= READ_ONLY_BASE_SINCE
    sealed = "machines get a sealed copy of an image's memory, which takes its size of RAM once"
    return [
        _line(
            "users",
            facts.root,
            "the monitor of each machine has a user and groups of its own, and no capability",
            "monitors run as the user of the server: one that is taken over reads and ends all",
            "run the server as root",
        ),
        _line(
            "slots",
            _slots(facts, settings),
            "the monitor of each machine is in a network of its own that lets nothing of it out",
            "monitors are in the network of this host: one that is taken over reaches all it does",
            "leave WRENN_NETWORK at auto or tap, and see the lines root to nftables",
        ),
        _line(
            "jail",
            not facts.jail_obstacle,
            "monitors see no file, process or IPC of this host but those of their machine",
            "monitors see the files that every user may read, and all processes"
            f" ({facts.jail_obstacle})",
            "run the server as root, on Linux 5.12 or later, outside of a container or in one that"
            " may mount (CAP_SYS_ADMIN, no AppArmor profile that denies it)",
        ),
        _line(
            "seccomp",
            facts.qemu_seccomp,
            "monitors give up system calls that they do not need",
            "monitors may use all system calls that every user may",
            "install a QEMU with seccomp support on a kernel with CONFIG_SECCOMP_FILTER",
        ),
        _line(
            "memory images",
            read_only or facts.sealed_memory,
            "QEMU opens the memory of images for reading only" if read_only else sealed,
            "this QEMU opens the memory of images for writing, and there is no sealed memory",
            "install QEMU 8.2 or later",
            "missing",
        ),
        *(_cgroup(facts, name, *words) for name, words in _BOUNDED.items()),
    ]


def _cgroup(facts: MachineFacts, controller: str, what: str, without: str) -> Line:
    return _line(
        f"cgroup {controller}",
        controller in facts.cgroup_controllers,
        f"the {what} of each machine is bounded, its monitor's own included",
        without + ("" if facts.cgroup_v2 else ": the unified hierarchy (cgroup v2) is not mounted"),
        "run as root with the unified hierarchy alone (systemd.unified_cgroup_hierarchy=1);"
        " in a container, with /sys/fs/cgroup writable and a group below for its own processes",
    )


def _size(megabytes: int) -> str:
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes} MB"
