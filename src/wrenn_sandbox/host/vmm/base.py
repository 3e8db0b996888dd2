"""What a driver is: the few things the host asks of a virtual machine monitor.

A driver never decides: it starts, captures and ends machines and raises `errors.HostFailure`.
All state it needs to find a machine again is in `Process` and the machine's directory, so that
any driver object can adopt what another one started.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.disk.base import DiskFormat
from wrenn_sandbox.host.images.manifest import FileDigest
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.slot import Slot


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do on this machine."""

    name: str
    version: str
    accelerator: str
    own_kernel: bool
    """A guest has a kernel of its own, which a template's guest lets come to rest."""
    cpu_model: str
    """What guests see as their processor."""
    firmware: str = ""
    engine: str = ""
    """Digest of the engine that machines are started with; none where nothing is kept of it."""
    tsc_khz: int = 0
    """Rate of the time-stamp counter that an emulated guest sees."""


@dataclass(frozen=True)
class MachineSpec:
    """One machine to be: its files, its network slot and its size (memory in MiB)."""

    files: MachineFiles
    """The machine's own directory, which exists."""
    slot: Slot
    vcpus: int
    memory_mb: int
    kernel: Path
    initrd: Path
    kernel_args: str
    runtime: Path
    disk_mb: int
    """Size of the guest's disk."""
    disks: tuple[Path, ...] = ()
    """What the machine's own disk layer builds on: disks of images, and, when it is started, the
    layers that are stored of its sandbox."""
    memory: Path | None = None
    """The immutable image that guest memory is a private mapping of; none after a cold boot."""
    memory_below: Path | None = None
    """The memory that `memory` is no more than pages over: the mapping is of both together."""
    private_memory: bool = False
    """No other machine maps that image."""
    engine: str = ""
    """Digest of the kept engine that continues a snapshot; empty for the driver's own."""
    disk_bytes_per_sec: int = 0
    """What the guest may read and write on its disk together; 0 for no bound."""
    disk_operations_per_sec: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A stored machine to continue: its device state, and the directory that holds the pages which
    differ from the memory image (`memory.idx` and `memory.diff`), if any do.
    """

    vmstate: Path
    diff: Path | None = None
    check: Callable[[], None] | None = None
    """Raises `IncompatibleImage` unless both are as they were stored; blocks.

    It reads all of them. A driver does that while its VMM starts; no guest runs before.
    """

    async def checked(self) -> None:
        """Do that in a thread."""
        if self.check is not None:
            await asyncio.to_thread(self.check)


class Process(msgspec.Struct, frozen=True):
    """A running monitor: its pid and its start time in clock ticks since boot."""

    pid: int
    start_time: int


class Driver(Protocol):
    """Nine calls, two for disks that are layered, and `tend` where there is something to tend.

    A driver inherits from this class, so that it has what it does not define.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def disk_format(self) -> DiskFormat:
        """The format of the machines' own disk layers."""
        ...

    async def boot(self, spec: MachineSpec, *, record: Path | None = None) -> Process:
        """Start a machine from its kernel. With `record`, guest memory is that new file."""
        ...

    async def restore(self, spec: MachineSpec, snapshot: Snapshot) -> Process:
        """Start a machine that continues a snapshot, of which nothing is changed.

        After a failure nothing runs.
        """
        ...

    async def pause(self, process: Process, spec: MachineSpec, into: Path) -> dict[str, FileDigest]:
        """Stop the machine and store `vmstate` and, of a restored one, its own pages in `into`.

        Returns the files with digests by BLAKE3. The machine stays stopped; on failure it runs on.
        Nothing is synced.
        """
        ...

    async def add_layer(self, process: Process, spec: MachineSpec, layer: Path) -> None:
        """Have a machine that `pause` stopped write to this empty layer over its disk.

        The layer is in the machine's directory and its user's. What the guest has written before is
        in the file of the old one. Only where the disk format is layered. After a failure
        `writes_to` says which one it is.
        """
        raise HostFailure("Disks of this driver have no layers")

    async def writes_to(self, process: Process, layer: Path) -> bool:
        """Whether a machine has the layer that `add_layer` was to add, perhaps by another server.

        Raises `HostFailure` where it does not say.
        """
        return False

    async def unpause(self, process: Process, spec: MachineSpec) -> None:
        """Let a machine that `pause` stopped run on."""
        ...

    async def stopped(self, process: Process) -> bool:
        """Whether the end of a machine was its guest's doing: its monitor is there still.

        Asked after `wait` has returned.

        All that the guest has written is in its disk layer then. Raises `HostFailure` where the
        monitor is there and does not say.
        """
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

    async def diagnosis(self, process: Process) -> str:
        """The end of what guest and monitor wrote; for the log, never for a caller."""
        ...

    async def console(self, process: Process) -> bytes:
        """What the guest has written to its console since the last call, the last 64 KiB at most.

        Also once the machine has ended, if not killed yet: as far as it is known. Takes a second at
        most.
        """
        return b""

    async def tend(self, idle: float) -> None:
        """Do what is due every few seconds; a driver without such work has none.

        Lets machines go on that stand still since the host's disk was full. Frees what is kept
        for memory images that are gone, or that nobody has used for `idle` seconds: it is made
        anew when a machine needs it. Raises OSError.
        """
        return
