"""A driver without virtual machines: the guest agent as an ordinary local process.

For tests of everything around a VM. It isolates nothing, and a restored machine keeps its files
(the home directory) but not its processes: its device state is a tar archive of that directory.
One that boots from the disk of a stored one finds that archive beside it.
"""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from blake3 import blake3

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.host.disk.qcow2 import Qcow2
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.manifest import FileDigest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.paths import guest_files
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.privileged.process import ProcessHandle, process_start_time
from wrenn_sandbox.host.stages import stage

from .base import Capabilities, Driver, MachineSpec, Process, Snapshot

_HOME: Final = "home"
_LAYER: Final = "layer"
_TEMPLATE: Final = "minimal"
_DISK_MB: Final = 64
_CONSOLE_BYTES: Final = 64 * 1024


class FakeDriver(Driver):
    """Each machine is an agent process and the processes that it started."""

    disk_format = Qcow2()

    def __init__(self) -> None:
        self._handles: dict[Process, ProcessHandle] = {}
        self._consoles: dict[Process, BinaryIO] = {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="fake", version="1", accelerator="none", own_kernel=False, cpu_model="none"
        )

    async def boot(self, spec: MachineSpec, *, record: Path | None = None) -> Process:
        if record is not None:
            await asyncio.to_thread(_sparse, record, spec.memory_mb << 20)
        if spec.disks and (archive := spec.disks[-1].with_name(form.VMSTATE)).exists():
            await asyncio.to_thread(_unpack, archive, _home(spec))
        return await self._start(spec)

    async def restore(self, spec: MachineSpec, snapshot: Snapshot) -> Process:
        await snapshot.checked()
        await asyncio.to_thread(_unpack, snapshot.vmstate, _home(spec))
        return await self._start(spec)

    async def pause(self, process: Process, spec: MachineSpec, into: Path) -> dict[str, FileDigest]:
        with stage("stop"):
            self._handles[process].signal(signal.SIGSTOP)
        try:
            with stage("capture"):
                return await asyncio.to_thread(_store, spec, into)
        except OSError as error:
            self._handles[process].signal(signal.SIGCONT)
            raise HostFailure("The sandbox could not be stored", detail=str(error)) from error

    async def add_layer(self, process: Process, spec: MachineSpec, layer: Path) -> None:
        """Nothing writes to either."""
        (spec.files.directory / _LAYER).write_text(layer.name)

    async def writes_to(self, process: Process, layer: Path) -> bool:
        note = layer.with_name(_LAYER)
        return note.exists() and note.read_text() == layer.name

    async def unpause(self, process: Process, spec: MachineSpec) -> None:
        self._handles[process].signal(signal.SIGCONT)

    async def stopped(self, process: Process) -> bool:
        return False

    async def kill(self, process: Process) -> None:
        handle = self._handles.pop(process, None)
        if handle is None:
            try:
                handle = ProcessHandle.adopt(process.pid, process.start_time)
            except ProcessLookupError:
                return
        await asyncio.to_thread(_kill_descendants, process.pid)
        await handle.kill()
        handle.close()
        if (console := self._consoles.pop(process, None)) is not None:
            console.close()

    async def adopt(self, process: Process, spec: MachineSpec) -> bool:
        try:
            self._handles[process] = ProcessHandle.adopt(process.pid, process.start_time)
        except ProcessLookupError:
            return False
        self._handles[process].signal(signal.SIGCONT)
        self._consoles[process] = await asyncio.to_thread(_end_of, spec.files.vmm_log)
        return True

    async def wait(self, process: Process) -> str:
        status = await self._handles[process].wait()
        return "the agent ended" + ("" if status is None else f" ({status})")

    async def diagnosis(self, process: Process) -> str:
        return ""

    async def console(self, process: Process) -> bytes:
        """What the agent wrote to standard error."""
        console = self._consoles.get(process)
        if console is None:
            return b""
        with suppress(ValueError):  # it is closed when the machine is ended meanwhile
            return await asyncio.to_thread(console.read, _CONSOLE_BYTES)
        return b""

    async def close(self) -> None:
        """Let go of all machines; they run on."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()
        for console in self._consoles.values():
            console.close()
        self._consoles.clear()

    async def _start(self, spec: MachineSpec) -> Process:
        """The agent's process; one that a thread still starts when this is cancelled is ended."""
        starting = asyncio.create_task(asyncio.to_thread(self._spawn, spec))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            with suppress(OSError):
                await shielded(self._ended(starting))
            raise

    async def _ended(self, starting: "asyncio.Task[Process]") -> None:
        await self.kill(await starting)

    def _spawn(self, spec: MachineSpec) -> Process:
        home = _home(spec)
        home.mkdir(exist_ok=True)
        argv = [sys.executable, "-I", "-S", str(guest_files().agent / "main.py")]
        argv += ["--port", str(spec.slot.host_port), "--home", str(home)]
        with open(spec.files.vmm_log, "ab") as log:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        handle = ProcessHandle.of_child(child)
        process = Process(handle.pid, handle.start_time)
        self._handles[process] = handle
        self._consoles[process] = spec.files.vmm_log.open("rb")
        failpoints.reach("machine.spawned")
        return process


def publish_template(store: ImageStore, kernel: bytes = b"") -> None:
    """A template of the usual name, with nothing in it but maybe a kernel."""
    with store.staging() as made:
        for name in (form.KERNEL, form.INITRD, form.RUNTIME):
            (made / name).touch()
        (made / form.KERNEL).write_bytes(kernel)
        _sparse(made / form.DISK, _DISK_MB << 20)
        files = {path.name: form.describe(path) for path in made.iterdir()}
        image = form.Manifest(
            image_id=form.derived_id(files, "fake"),
            created_at=form.now(),
            name=_TEMPLATE,
            recipe_sha256="",
            files=files,
            kernel_args="",
            vcpus=1,
            memory_mb=512,
            disk_mb=_DISK_MB,
        )
        store.publish(made, image, name=_TEMPLATE)


def _end_of(path: Path) -> BinaryIO:
    file = path.open("rb")
    file.seek(0, os.SEEK_END)
    return file


def _home(spec: MachineSpec) -> Path:
    return spec.files.directory / _HOME


def _sparse(path: Path, size: int) -> None:
    with open(path, "xb") as file:
        file.truncate(size)


def _store(spec: MachineSpec, into: Path) -> dict[str, FileDigest]:
    _tar(["-c", "-f", str(into / form.VMSTATE), "-C", str(_home(spec)), "."])
    names = [form.VMSTATE]
    if spec.memory is not None:
        pages = (spec.memory_mb << 20) // os.sysconf("SC_PAGESIZE")
        (into / diff.INDEX).write_bytes(diff.encode_index([], pages))
        (into / diff.PAGES).touch()
        names += [diff.INDEX, diff.PAGES]
    files = {name: (into / name).read_bytes() for name in names}
    return {
        name: FileDigest(len(data), blake3=blake3(data).hexdigest()) for name, data in files.items()
    }


def _unpack(archive: Path, home: Path) -> None:
    home.mkdir(exist_ok=True)
    _tar(["-x", "-p", "-f", str(archive), "-C", str(home)])


def _tar(arguments: list[str]) -> None:
    done = subprocess.run(["tar", *arguments], capture_output=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.decode("utf-8", "replace")[:500])


def _kill_descendants(pid: int) -> None:
    """Kill what the agent started, each in a session of its own, while it can still be found."""
    for child in _children(pid):
        _kill_descendants(child)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _children(pid: int) -> list[int]:
    try:
        process_start_time(pid)
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
    except OSError:
        return []
    return [int(each) for each in text.split()]
