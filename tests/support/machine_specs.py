"""A machine that a test starts no VMM for, or one of its own making."""

from pathlib import Path

from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm.base import MachineSpec

SLOT = Slot(index=1, netns=None, host_ip="127.0.0.1", uid=720_001, tap=None, host_port=1)


def machine_spec(directory: Path, file: Path, disk_mb: int = 1) -> MachineSpec:
    """With `directory` as its own and `file` for everything that it reads."""
    return MachineSpec(
        files=MachineFiles(directory),
        slot=SLOT,
        vcpus=1,
        memory_mb=128,
        kernel=file,
        initrd=file,
        kernel_args="",
        runtime=file,
        disk_mb=disk_mb,
    )
