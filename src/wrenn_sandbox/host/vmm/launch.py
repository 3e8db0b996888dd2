"""Starting a machine's process with all that keeps it apart."""

import asyncio
import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.privileged.cgroups import Bounds, Groups
from wrenn_sandbox.host.privileged.confinement import Confinement
from wrenn_sandbox.host.privileged.jail import View
from wrenn_sandbox.host.privileged.limits import Limits
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.privileged.spawn import NOTHING, Output, spawn_in_slot

from .base import MachineSpec


async def launch(
    confinement: Confinement,
    spec: MachineSpec,
    argv: Sequence[str],
    *,
    programs: Path | None = None,
    environment: Mapping[str, str] = NOTHING,
    readable: Sequence[Path] = (),
    pass_fds: Collection[int] = (),
    output: Output = subprocess.DEVNULL,
    groups: tuple[int, ...] = (),
    extra_mb: int = 0,
) -> ProcessHandle:
    """Start `argv` as this machine's process.

    It sees the machine's directory, the files that its disks consist of, those that are `readable`
    besides, and the directory `programs` if it is started from there. `extra_mb` is what this VMM
    may take in MiB besides what every one does. Raises OSError and `HostFailure`; nothing runs
    then.
    """
    files = [spec.runtime, *spec.disks, *readable]
    async with AsyncExitStack() as stack:
        group: int | None = None
        if confinement.groups is not None:
            group = await asyncio.to_thread(group_of, confinement.groups, spec, extra_mb)
            stack.callback(os.close, group)
        return await spawn_in_slot(
            spec.slot,
            argv,
            jail=confinement.jail,
            view=View(spec.files.directory, tuple(files), programs),
            group=group,
            limits=limits(spec, extra_mb, own_user=os.geteuid() == 0),
            pass_fds=pass_fds,
            output=output,
            cwd=spec.files.directory,
            groups=groups,
            environment=environment,
        )


def group_of(groups: Groups, spec: MachineSpec, extra_mb: int = 0) -> int:
    """A descriptor of this machine's control group, made first; raises OSError. Blocks."""
    return groups.open(spec.files.directory.name, bounds(spec, extra_mb))


_MB: Final = 1 << 20
_THREADS: Final = 256
"""Processors of the guest, and up to 64 that wait for files at once; the rest is room."""
_BUSY_THREADS: Final = 72
_THREAD_MB: Final = 72
"""Addresses of one thread: a stack of 8 MB, and where there are processors for it a heap of 64."""
_ADDRESSES_MB: Final = 2048
"""Libraries and tables; measured with 8 processors, 4 GB and many files at once: 3 GB in all."""
_OWN_MB: Final = 256
_OWN_MB_PER_CPU: Final = 16
"""What the process itself comes to use of that, and pages of files in the host's cache."""
_OWN_CPUS: Final = 1.0
_HOLES: Final = 2
"""Where a guest has given space back the layer has holes, and large writes go behind its end: its
length passes the disk's size then, though not what it takes. Were that too little, a guest would
see errors of its disk."""
_METADATA_MB: Final = 64


def limits(spec: MachineSpec, extra_mb: int = 0, *, own_user: bool) -> Limits:
    """For the process alone; `own_user` says that nothing else runs as its user."""
    disk = spec.disk_mb * _MB
    layer = _HOLES * disk + _METADATA_MB * _MB
    memory = spec.memory_mb * _MB
    own = _ADDRESSES_MB + extra_mb + (_BUSY_THREADS + spec.vcpus) * _THREAD_MB
    return Limits(
        file_size=max(layer, memory + _METADATA_MB * _MB),
        address_space=memory + own * _MB,
        threads=_THREADS if own_user else None,
    )


def bounds(spec: MachineSpec, extra_mb: int = 0) -> Bounds:
    """For its control group."""
    own = extra_mb + _OWN_MB + spec.vcpus * _OWN_MB_PER_CPU
    return Bounds(
        memory=(spec.memory_mb + own) * _MB,
        cpus=spec.vcpus + _OWN_CPUS,
        threads=_THREADS,
    )
