"""The command line of a machine. A restored machine must have the devices of the saved one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.slot import GATEWAY_IP, GUEST_IP, GUEST_MAC, Slot
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.wire.guest import AGENT_PORT

CONSOLE_BYTES: Final = 64 * 1024
CONSOLE: Final = "console"
ROOT_DRIVE: Final = "root"
SECCOMP: Final = (
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)
BINARY: Final = "qemu-system-x86_64"
_PROCESS: Final = BINARY[:15]
"""The name that the kernel gives a process of that program: it may be started by another one."""
MACHINE: Final = "microvm,acpi=on,x-option-roms=off,isa-serial=on,suppress-vmdesc=on"
KVM_CPUS: Final = ("host", "host,-arch-capabilities", "Nehalem")
"""What guests get under KVM: the first with which QEMU starts. Some hosts' KVM refuses registers
that it offers (seen: `failed to set MSR 0x10a`); the last one is what most software wants at
least."""
OF_THIS_HOST: Final = frozenset({"base", "host", "max"})
"""These name no model: what they stand for depends on the host and the version of QEMU."""
ENFORCE: Final = "enforce"
"""After a model: QEMU refuses to start rather than leave out what the host has not got."""
TRANSLATION_CACHE_MB: Final = 128
READ_ONLY_BASE_SINCE: Final = (8, 2)
"""The version that can open the file of a private mapping for reading only."""


@dataclass(frozen=True)
class Program:
    """How a QEMU is started: what its options follow, and what it needs in its environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """The file behind guest memory: shared writes reach the file, private ones do not."""

    path: str
    shared: bool
    read_only_file: bool
    """The file is opened read-only (QEMU 8.2 and later) for a private writable mapping."""


@dataclass(frozen=True)
class Variant:
    """What differs between QEMU binaries and hosts; part of what a snapshot depends on."""

    program: Program
    accelerator: str
    firmware: str | None
    tsc_khz: int | None = None
    """Rate of the guest's time-stamp counter, where the guest could not find it out."""
    seccomp: bool = True
    """The binary can give up system calls that it does not need."""
    cpu: str = "max"


def command(
    variant: Variant,
    spec: MachineSpec,
    memory: Memory | None,
    disks_below: int,
    *,
    qmp_fd: int,
    tap_fd: int | None,
    restore: bool,
) -> list[str]:
    """The argv that starts a machine, or with `restore` one that waits for its state.

    `disks_below` counts the files that the machine's disk layer builds on.
    """
    accelerator = (
        "kvm"
        if variant.accelerator == "kvm"
        else f"tcg,thread=multi,tb-size={TRANSLATION_CACHE_MB}"
    )
    argv = [
        *variant.program.argv,
        "-M",
        f"{MACHINE},memory-backend=ram0",
        "-accel",
        accelerator,
        "-cpu",
        variant.cpu,
        "-m",
        str(spec.memory_mb),
        "-smp",
        str(spec.vcpus),
        "-object",
        _memory(spec, memory),
        "-name",
        f"process={_PROCESS}",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-action",
        "reboot=shutdown,shutdown=pause,panic=pause",
        *(SECCOMP if variant.seccomp else ()),
        *(() if restore else _kernel(variant, spec)),
        "-chardev",
        f"ringbuf,id={CONSOLE},size={CONSOLE_BYTES}",
        "-serial",
        f"chardev:{CONSOLE}",
        "-drive",
        f"id={ROOT_DRIVE},file={_escaped(spec.files.overlay)},format=qcow2,if=none,cache=unsafe,discard=unmap"
        + _unlocked(disks_below)
        + _throttling(spec),
        "-device",
        f"virtio-blk-device,drive={ROOT_DRIVE}",
        "-drive",
        f"id=runtime,file={_escaped(spec.runtime)},format=raw,if=none,readonly=on,file.locking=off",
        "-device",
        "virtio-blk-device,drive=runtime",
        "-netdev",
        _netdev(spec.slot, tap_fd),
        "-device",
        f"virtio-net-device,netdev=net0,mac={GUEST_MAC}",
        "-object",
        "rng-random,id=rng0,filename=/dev/urandom",
        "-device",
        "virtio-rng-device,rng=rng0",
        "-chardev",
        f"socket,id=qmp,fd={qmp_fd},server=on,wait=off",
        "-mon",
        "chardev=qmp,mode=control",
    ]
    if variant.firmware is not None:
        argv += ["-bios", variant.firmware]
    argv += ["-global", "migration.send-configuration=off"]
    if restore:
        argv += ["-incoming", "defer"]
    return argv


def _kernel(variant: Variant, spec: MachineSpec) -> list[str]:
    """What a machine boots from; QEMU copies it all into its own memory, for the firmware to read.

    A restored guest never reads it: where it would reboot, its machine ends.
    """
    return [
        *("-kernel", str(spec.kernel), "-initrd", str(spec.initrd)),
        *("-append", _kernel_args(variant, spec)),
    ]


def _kernel_args(variant: Variant, spec: MachineSpec) -> str:
    """With user-mode networking the guest's init is told that its network leads nowhere.

    TCG translates code again when it appears at another address. An emulated guest therefore
    loads its programs at fixed addresses: they start two to four times faster.
    """
    arguments = spec.kernel_args
    if spec.slot.netns is None:
        arguments += " wrenn.network=none"
    if variant.accelerator == "tcg":
        arguments += " norandmaps"
    if variant.tsc_khz is None:
        return arguments
    return f"{arguments} tsc_early_khz={variant.tsc_khz}"


def _memory(spec: MachineSpec, memory: Memory | None) -> str:
    if memory is None:
        return f"memory-backend-ram,id=ram0,size={spec.memory_mb}M"
    share = "on" if memory.shared else "off"
    options = f"mem-path={_escaped(memory.path)},share={share}"
    if memory.read_only_file:
        options += ",readonly=on,rom=off"
    return f"memory-backend-file,id=ram0,size={spec.memory_mb}M,{options}"


def _netdev(slot: Slot, tap_fd: int | None) -> str:
    if tap_fd is not None:
        return f"tap,id=net0,fd={tap_fd}"
    return (
        f"user,id=net0,restrict=on,net=169.254.0.0/24,host={GATEWAY_IP},dns=169.254.0.23,"
        f"dhcpstart={GUEST_IP},hostfwd=tcp:127.0.0.1:{slot.host_port}-{GUEST_IP}:{AGENT_PORT}"
    )


def _unlocked(disks_below: int) -> str:
    """No locks on what nobody changes: one machine's would keep all others from starting."""
    return "".join(f",{'backing.' * each}file.locking=off" for each in range(1, disks_below + 1))


def _throttling(spec: MachineSpec) -> str:
    """What bounds the guest's use of its disk; the guest does not see it."""
    options = ""
    if spec.disk_bytes_per_sec:
        options += f",throttling.bps-total={spec.disk_bytes_per_sec}"
    if spec.disk_operations_per_sec:
        options += f",throttling.iops-total={spec.disk_operations_per_sec}"
    return options


def _escaped(path: Path | str) -> str:
    """A path inside a comma-separated option."""
    return str(path).replace(",", ",,")
