"""What a monitor is held to leaves room for what an honest guest makes it do."""

import subprocess
from pathlib import Path

from support.machine_specs import machine_spec
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.disk.qcow2 import overlay
from wrenn_sandbox.host.vmm.launch import limits

DISK_MB = 256
CLUSTER = 64 * 1024


def test_a_layer_with_holes_stays_below_the_limit_of_its_length(tmp_path: Path) -> None:
    """Two halves of a disk written in turns, one given back and written anew in large pieces."""
    size, half = DISK_MB << 20, DISK_MB << 19
    base, layer = tmp_path / "base", tmp_path / "layer"
    with base.open("wb") as file:
        file.truncate(size)
    overlay.create(layer, below=Disk(base, raw=True), size=size)
    places = range(0, half, CLUSTER)
    commands = [f"write -q {at} 64k\nwrite -q {half + at} 64k" for at in places]
    commands += [f"discard -q {half + at} 64k" for at in places]
    commands += [f"write -q {half + at} 1M" for at in range(0, half, 1 << 20)]
    subprocess.run(
        ["qemu-io", "-n", "-d", "unmap", "-t", "unsafe", str(layer)],
        input="\n".join((*commands, "quit")),
        text=True,
        check=True,
        capture_output=True,
    )
    status = layer.stat()
    bound = limits(machine_spec(tmp_path, base, DISK_MB), own_user=True).file_size
    assert bound is not None
    assert size + (100 << 20) < status.st_size < bound
    assert status.st_blocks * 512 < size + (8 << 20)
