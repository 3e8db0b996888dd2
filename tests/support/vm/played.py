"""The Firecracker driver over the played API: processes in the place of VMs, in no jail."""

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from support import played_firecracker
from wrenn_sandbox.host.backends import Backend, Start
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import guest_files
from wrenn_sandbox.host.privileged.confinement import Confinement
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import kill_now, runs
from wrenn_sandbox.host.vmm.base import Driver, MachineSpec, Process
from wrenn_sandbox.host.vmm.fake import publish_template
from wrenn_sandbox.host.vmm.firecracker.binary import Firecracker
from wrenn_sandbox.host.vmm.firecracker.driver import FirecrackerDriver
from wrenn_sandbox.host.vmm.firecracker.process import Running

_KERNEL = b"\x7fELF"


class PlayedDriver(FirecrackerDriver):
    """It tells each process the port of its agent, and has no taps."""

    def __init__(
        self, program: Firecracker, engines: EngineStore, namespaces: NamespaceThread
    ) -> None:
        super().__init__(program, engines, namespaces, Confinement())

    async def _spawn(
        self,
        firecracker: Firecracker,
        spec: MachineSpec,
        readable: Sequence[Path],
        fds: Sequence[int] = (),
    ) -> Running:
        port = spec.files.directory / played_firecracker.PORT
        await asyncio.to_thread(port.write_text, str(spec.slot.host_port), "ascii")
        home = spec.files.directory / played_firecracker.HOME
        await asyncio.to_thread(home.mkdir)
        if os.geteuid() == 0:
            os.chown(home, spec.slot.uid, spec.slot.uid)
        return await super()._spawn(firecracker, spec, readable, fds)

    async def _boot(self, running: Running, spec: MachineSpec) -> None:
        await super()._boot(running, replace(spec, slot=replace(spec.slot, tap="tap0")))

    async def _bring_up(self, spec: MachineSpec) -> None:
        return

    async def kill(self, process: Process) -> None:
        """The agent first: a guest ends with its VM, not a moment later."""
        if runs(process.pid, process.start_time):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for pid in (await asyncio.to_thread(children.read_text, "ascii")).split():
                await asyncio.to_thread(kill_now, int(pid))
        await super().kill(process)


async def _create(start: Start) -> Driver:
    publish_template(ImageStore(start.paths), _KERNEL)
    program = _installed(start.paths.data_dir / "played")
    driver = PlayedDriver(program, start.engines, start.namespaces)
    start.undo.push_async_callback(driver.close)
    return driver


def _installed(directory: Path) -> Firecracker:
    """The program and the agent, where users of machines can reach them."""
    program = Firecracker(played_firecracker.VERSION, "", directory)
    if not directory.exists():
        shutil.copytree(guest_files().agent, directory / "agent")
        source = Path(played_firecracker.__file__).read_text("utf-8")
        python = Path(sys.base_prefix, "bin", "python3").resolve()
        program.program.write_text(f"#!{python} -IS\n{source}", "utf-8")
        program.program.chmod(0o755)
    return program


PLAYED = Backend(_create, r"\S+ -IS \S*/played/firecracker", user_network=True)
