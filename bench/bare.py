"""QEMU alone, started with the product's own command line: what no way around it can beat.

No other user, no namespace, no journal, no guest agent; blocking calls on one socket.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.disk.qcow2.reader import depth
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.launch_source import LaunchSource, spec_of
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.memory.base_image import SealedMemories
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.tap import open_tap
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.host.vmm.files import short_path
from wrenn_sandbox.host.vmm.qemu.command import Memory, command
from wrenn_sandbox.host.vmm.qemu.driver import QemuDriver
from wrenn_sandbox.ids import new_machine_id

from .rig import guest_memory

_NO_LIMIT = 1 << 40
_RETRY_SEC = 0.01


class Qmp:
    """A QMP connection; blocks."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        with short_path(path) as name:
            self._sock.connect(name)
        self._lines = self._sock.makefile("rb")
        self._lines.readline()
        self._events: list[str] = []
        self.call("qmp_capabilities")

    def call(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        """Execute a command and wait for its success."""
        self._send(command, arguments or {}, [])

    def give(self, name: str, fd: int) -> None:
        """Hand a descriptor over under a name."""
        self._send("getfd", {"fdname": name}, [fd])

    def wait_for(self, wanted: str) -> None:
        """Wait until an event whose text contains `wanted` has come."""
        while not any(wanted in event for event in self._events):
            line = self._lines.readline()
            assert line, "QEMU ended"
            self._events.append(line.decode())
        self._events.clear()

    def close(self) -> None:
        self._lines.close()
        self._sock.close()

    def _send(self, command: str, arguments: Mapping[str, object], fds: list[int]) -> None:
        message = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._sock, [message], fds)
        while b'"return"' not in (line := self._lines.readline()):
            assert line, "QEMU ended"
            assert b'"error"' not in line, line
            self._events.append(line.decode())


class Bare:
    """A machine directory, slot and command line; `start` and `load` are what is timed."""

    def __init__(
        self, context: HostContext, spec: MachineSpec, source: LaunchSource, tap: int | None
    ) -> None:
        assert isinstance(context.driver, QemuDriver)
        self._variant = context.driver._qemu.variant
        self._context = context
        self._spec = spec
        self._origin = source
        self._tap = tap
        self._process: subprocess.Popen[bytes] | None = None
        self._undo = contextlib.ExitStack()
        self.qmp: Qmp

    @classmethod
    @asynccontextmanager
    async def prepared(cls, context: HostContext, source: LaunchSource) -> AsyncIterator["Bare"]:
        """Everything but QEMU; all is gone in the end."""
        async with AsyncExitStack() as stack:
            slot = await context.slots.acquire()
            stack.callback(context.slots.release, slot)
            namespaces = NamespaceThread("bench")
            stack.callback(namespaces.close)
            record = Record(
                machine_id=new_machine_id(context.random),
                image_id=source.image.image_id,
                vcpus=source.vcpus,
                memory_mb=source.memory_mb,
                driver=context.driver.capabilities.name,
                boot_id=journal.boot_id(),
                slot=slot,
            )
            spec = spec_of(context, record)
            spec.files.directory.mkdir()
            stack.callback(shutil.rmtree, spec.files.directory)
            context.driver.disk_format.create(
                spec.files.overlay, source.disk, source.image.disk_size
            )
            tap = None if slot.netns is None else await open_tap(namespaces, slot)
            if tap is not None:
                stack.callback(os.close, tap)
            bare = cls(context, spec, source, tap)
            stack.callback(bare._undo.close)
            bare._ready()
            yield bare

    def _ready(self) -> None:
        assert self._origin.snapshot is not None
        self._vmstate = os.open(self._origin.snapshot.vmstate, os.O_RDONLY)
        self._undo.callback(os.close, self._vmstate)
        self._listener = self._undo.enter_context(socket.socket(socket.AF_UNIX))
        with short_path(self._spec.files.control_socket) as name:
            self._listener.bind(name)
        self._listener.listen(1)
        self._passed = [self._listener.fileno(), self._vmstate]
        self._argv = command(
            self._variant,
            self._spec,
            self._memory(),
            depth(self._spec.files.overlay),
            qmp_fd=self._listener.fileno(),
            tap_fd=self._tap,
            restore=True,
        )
        if self._tap is not None:
            self._passed.append(self._tap)

    def _memory(self) -> Memory:
        image = self._spec.memory
        assert image is not None
        if tuple(map(int, self._context.driver.capabilities.version.split(".")[:2])) >= (8, 2):
            return Memory(str(image), shared=False, read_only_file=True)
        sealed = SealedMemories()
        fd = sealed.get(image)
        sealed.close()
        self._passed.append(fd)
        self._undo.callback(os.close, fd)
        return Memory(f"/proc/self/fd/{fd}", shared=False, read_only_file=False)

    def start(self) -> None:
        """From nothing to an answer of the monitor; blocks."""
        self._process = subprocess.Popen(
            self._argv,
            pass_fds=self._passed,
            env={**ENVIRONMENT, **self._variant.program.environment},
        )
        self._undo.callback(_kill, self._process)
        self.qmp = Qmp(self._spec.files.control_socket)
        self._undo.callback(self.qmp.close)

    def load(self) -> None:
        """From there to a guest that runs, with its stored pages if it has any; blocks."""
        assert self._origin.snapshot is not None
        assert self._process is not None
        if self._origin.snapshot.diff is not None:
            mapping = guest_memory(self._process.pid, self._spec)
            diff.inject(mapping, self._origin.snapshot.diff)
        self.qmp.call("migrate-incoming", {"uri": f"fd:{self._vmstate}"})
        self.qmp.wait_for('"RESUME"')

    async def answered(self) -> None:
        """Wait until the guest's agent says that it is well."""
        connect = self._context.connect
        with contextlib.closing(GuestClient(lambda: connect(self._spec.slot), None)) as client:
            while True:
                try:
                    return await client.health()
                except AgentError:
                    await asyncio.sleep(_RETRY_SEC)

    def migrate(self, target: Path) -> None:
        """QEMU's own way: stop, write all memory and devices to a file, sync it; blocks."""
        with target.open("wb") as file:
            self.qmp.call("stop")
            self.qmp.give("target", file.fileno())
            self.qmp.call("migrate", {"uri": "fd:target"})
            self.qmp.wait_for('"completed"')
            os.fsync(file.fileno())

    def unlimited(self) -> None:
        """Let a migration be as fast as it can, and tell of its end."""
        self.qmp.call("migrate-set-parameters", {"max-bandwidth": _NO_LIMIT})
        events = [{"capability": "events", "state": True}]
        self.qmp.call("migrate-set-capabilities", {"capabilities": events})


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
