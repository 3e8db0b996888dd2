"""Starting a machine's process with all that keeps it apart."""

import asyncio
import os
import subprocess
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from wrenn_sandbox.host.privileged.confinement import Confinement
from wrenn_sandbox.host.privileged.jail import View
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.privileged.spawn import Output, spawn_in_slot
from wrenn_sandbox.host.vmm.base import MachineSpec

from .bounds import bounds, limits


async def launch(
    confinement: Confinement,
    spec: MachineSpec,
    argv: Sequence[str],
    *,
    readable: Sequence[Path] = (),
    pass_fds: Collection[int] = (),
    output: Output = subprocess.DEVNULL,
    groups: tuple[int, ...] = (),
) -> ProcessHandle:
    """Start `argv` as this machine's process.

    It sees the machine's directory, the files that its kernel and disk consist of, and those that
    are `readable` besides. Raises OSError and `HostFailure`; nothing runs then.
    """
    files = [spec.kernel, spec.initrd, spec.runtime, *spec.disks, *readable]
    async with AsyncExitStack() as stack:
        group: int | None = None
        if confinement.groups is not None:
            name = spec.files.directory.name
            group = await asyncio.to_thread(confinement.groups.open, name, bounds(spec))
            stack.callback(os.close, group)
        return await spawn_in_slot(
            spec.slot,
            argv,
            jail=confinement.jail,
            view=View(spec.files.directory, tuple(files)),
            group=group,
            limits=limits(spec, own_user=os.geteuid() == 0),
            pass_fds=pass_fds,
            output=output,
            cwd=spec.files.directory,
            groups=groups,
        )
