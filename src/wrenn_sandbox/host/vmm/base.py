"""What a driver is: the few things the host asks of a virtual machine monitor.

A driver never decides: it starts, captures and ends machines and raises `errors.HostFailure`.
All state it needs to find a machine again is in `Process` and the machine's directory, so that
any driver object can adopt what another one started.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from wrenn_sandbox.host.images.manifest import Machine
from wrenn_sandbox.host.network.slot import Slot


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do on this machine."""

    name: str
    version: str
    accelerator: str
    cold_images: bool
    """Machines boot from images; without, the host offers a template of the driver's own."""


@dataclass(frozen=True)
class MachineSpec:
    """One machine to be: its files, its network slot and its size (memory in MiB)."""

    directory: Path
    """The machine's own directory, which exists: sockets, console log, pid."""
    slot: Slot
    vcpus: int
    memory_mb: int
    kernel: Path
    initrd: Path
    kernel_args: str
    runtime: Path
    disk: Path
    """The writable layer, a qcow2 image that belongs to the slot's user."""


@dataclass(frozen=True)
class Snapshot:
    """A stored machine to continue. `diff` holds the pages that differ from `memory`."""

    memory: Path
    vmstate: Path
    diff: Path | None = None


class Process(msgspec.Struct, frozen=True):
    """A running monitor: its pid and its start time in clock ticks since boot."""

    pid: int
    start_time: int


@dataclass(frozen=True)
class Usage:
    """What a machine takes from the host; memory in bytes, its own pages only."""

    own_memory: int
    cpu_seconds: float


class Driver(Protocol):
    @property
    def capabilities(self) -> Capabilities: ...

    def machine(self, spec: MachineSpec) -> Machine:
        """What a snapshot of this machine would need to be restored here."""
        ...

    async def boot(self, spec: MachineSpec, *, memory: Path | None = None) -> Process:
        """Start a machine from its kernel. With `memory`, the guest's memory is that new file."""
        ...

    async def restore(self, spec: MachineSpec, snapshot: Snapshot) -> Process:
        """Continue a stored machine; nothing of the snapshot is changed."""
        ...

    async def pause(self, process: Process, spec: MachineSpec, into: Path) -> None:
        """Stop the machine and store vmstate and changed memory in `into`; it stays stopped."""
        ...

    async def unpause(self, process: Process, spec: MachineSpec) -> None:
        """Let a machine that `pause` stopped run on."""
        ...

    async def kill(self, process: Process) -> None:
        """End the machine at once and wait for its end; safe to repeat."""
        ...

    async def adopt(self, process: Process, spec: MachineSpec) -> bool:
        """Whether this process is still that machine; from then on it is this driver's."""
        ...

    async def wait(self, process: Process) -> str:
        """Wait for the machine's end; returns what is known of the reason."""
        ...

    async def usage(self, process: Process) -> Usage:
        """What the machine takes from the host now."""
        ...
