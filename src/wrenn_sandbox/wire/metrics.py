"""The numbers of one host as they cross the seam.

What is counted is counted since the host's start. Sizes are in bytes, times in seconds.
"""

from enum import StrEnum
from typing import Final

import msgspec

BUCKETS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
"""Upper bounds of the buckets into which times are counted: from a slot of the pool to a fork of
hundreds."""


class Path(StrEnum):
    """How a sandbox came to run."""

    HOT = "hot"
    """A VM of the pool was taken."""
    RESTORED = "restored"
    """A snapshot was restored."""
    BOOTED = "booted"
    """A guest was booted: the sandbox's own from its disk, or a template's for the first time."""


class Shortage(StrEnum):
    """What a host had too little of."""

    SANDBOXES = "sandboxes"
    MEMORY = "memory"
    DISK = "disk"
    NETWORK = "network"


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """How long a stage of an operation took, each time that it was completed.

    `counts` has one number for each of `BUCKETS`, of what took no longer than that and longer than
    the one before, and one for what took longer than all.
    """

    operation: str
    stage: str
    counts: tuple[int, ...]
    seconds: float


class PoolMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The VMs made in advance: how many are wanted and ready, and creates that got one or none."""

    wanted: int = 0
    ready: int = 0
    hits: int = 0
    misses: int = 0


class SlotMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Network slots: in use, made in advance, and all there can be; None without a limit."""

    used: int = 0
    ready: int = 0
    capacity: int | None = None


class StoredBytes(msgspec.Struct, frozen=True, kw_only=True):
    """What is allocated on the disk, by what it is for.

    `images` are templates and their warm snapshots, `snapshots` the images that teams have made,
    `paused` what is stored of sandboxes and the images made for them alone, `running` the disks of
    VMs that run, `engines` the kept VMMs.
    """

    images: int = 0
    snapshots: int = 0
    paused: int = 0
    running: int = 0
    engines: int = 0


class HostMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What a host has, has promised and has done.

    `vms` counts sandboxes by what the host has of them, and the pool's machines as `pooled`.
    `memory_limit` is what all VMs together may be promised; None where nothing bounds that.
    `stored` may be a minute old; None where it is not known yet. `refusals` are of requests for
    which there was no room.
    """

    vms: dict[str, int]
    vms_limit: int
    memory_total: int
    memory_free: int
    memory_reserve: int
    memory_promised: int
    memory_limit: int | None
    disk_total: int
    disk_free: int
    disk_reserve: int
    slots: SlotMetrics
    pool: PoolMetrics
    stored: StoredBytes | None
    refusals: dict[Shortage, int]
    stages: tuple[StageTimes, ...] = ()
