"""What a captured monitor does to everybody's files without writing to them: locks."""

import asyncio
from pathlib import Path

import pytest

from support.vm.rig import Api, Rig, Sandbox, eventually
from support.vm.stand import spec_of
from wrenn_sandbox.host.privileged.confinement import confinement
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.vmm.launch import launch

pytestmark = pytest.mark.vm

_PYTHON = "/usr/bin/python3"
_LOCK = """
import fcntl, os, signal, struct, sys
for path in sys.argv[1:]:
    kind = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(os.open(path, os.O_RDONLY), 37, kind)  # F_OFD_SETLK, which QEMU's locks are
print("locked", flush=True)
signal.pause()
"""


async def captured(rig: Rig, sandbox: str, output: Path) -> ProcessHandle:
    """A program in the place of a sandbox's monitor, which locks all that it may read."""
    spec, _ = spec_of(rig, sandbox)
    kernel = [spec.kernel, spec.initrd]
    files = [*kernel, spec.runtime, *spec.disks]
    confined = confinement(rig.data_dir, [_PYTHON, "--version"])
    try:
        with output.open("wb") as file:
            argv = [_PYTHON, "-I", "-c", _LOCK, *map(str, files)]
            return await launch(confined, spec, argv, readable=kernel, output=file)
    finally:
        confined.close()


def test_locks_of_one_hold_up_nobody(rig: Rig, api: Api, sandbox: Sandbox, tmp_path: Path) -> None:
    """Files of images are everybody's, and whoever may read a file may lock it."""
    output = tmp_path / "output"

    async def live() -> None:
        process = await captured(rig, sandbox.id, output)
        try:
            await asyncio.to_thread(others_live)
        finally:
            await process.kill()
            process.close()

    def others_live() -> None:
        assert eventually(lambda: output.read_text() == "locked\n", 10), output.read_text()
        other = api.create().id
        api.pause(other)
        api.resume(other)
        api.pause(other)
        api.resume(other)
        assert api.output(other, "echo alive") == "alive"
        api.delete(other)

    asyncio.run(live())
