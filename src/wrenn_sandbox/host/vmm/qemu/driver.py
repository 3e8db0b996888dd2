"""The QEMU driver."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self, TypeVar

import structlog
from blake3 import blake3

from wrenn_sandbox.aio import beside, first_of, shielded
from wrenn_sandbox.errors import HostFailure, WrennError
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.host.disk.qcow2 import Qcow2
from wrenn_sandbox.host.disk.qcow2.reader import depth
from wrenn_sandbox.host.engines import Engine, EngineStore
from wrenn_sandbox.host.images.manifest import VMSTATE, FileDigest
from wrenn_sandbox.host.memory import diff, pages
from wrenn_sandbox.host.memory.base_image import SealedMemories
from wrenn_sandbox.host.paths import MachineFiles, Paths
from wrenn_sandbox.host.privileged.confinement import Confinement, confinement
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.privileged.spawn import give_up_huge_pages, kvm_groups
from wrenn_sandbox.host.privileged.tap import open_tap
from wrenn_sandbox.host.probe import KVM_DEVICE
from wrenn_sandbox.host.stages import stage
from wrenn_sandbox.host.vmm.base import Capabilities, Driver, MachineSpec, Process, Snapshot
from wrenn_sandbox.host.vmm.files import append, make_own, read_state, shorten_log, tails
from wrenn_sandbox.host.vmm.launch import launch

from .binary import cpu_model, has_seccomp, version_of
from .command import (
    CONSOLE_BYTES,
    READ_ONLY_BASE_SINCE,
    TRANSLATION_CACHE_MB,
    Memory,
    Program,
    Variant,
    command,
)
from .engine import installed, program
from .monitor import Monitor, listen
from .process import (
    Running,
    connected,
    end,
    or_no_end,
    require_same,
    unless_ended,
)
from .tsc import host_tsc_khz

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_ENDED: Final = frozenset({"shutdown", "guest-panicked", "internal-error"})
_DISK_FULL: Final = "io-error"
"""A write found no space on the host; it is done again when the machine goes on."""
_FORMER_DISK: Final = "disk.qcow2"
"""What servers of before called the disk layer."""
_QBOOT_SINCE: Final = (8, 0)


@dataclass(frozen=True)
class Qemu:
    """One of the QEMUs that are kept here, or one that is not kept."""

    variant: Variant
    version: tuple[int, int, int]
    digest: str = ""
    directory: Path | None = None
    """Where it is kept."""


class QemuDriver(Driver):
    """Machines are processes of their slot's user; sockets and logs are in their directory.

    Each is started with the QEMU that has stored what it continues. `qemu` is the one that is
    installed: it boots machines.
    """

    disk_format = Qcow2()

    def __init__(
        self,
        qemu: Qemu,
        engines: EngineStore,
        namespaces: NamespaceThread,
        confinement: Confinement,
    ) -> None:
        self._qemu = qemu
        self._qemus = dict.fromkeys(("", qemu.digest), qemu)
        self._engines = engines
        self._namespaces = namespaces
        self._confinement = confinement
        self._sealed = SealedMemories()
        self._running: dict[Process, Running] = {}
        self._cpu_model = cpu_model(qemu.variant.cpu, qemu.variant.accelerator)

    @classmethod
    async def create(
        cls,
        accelerator: str,
        cpu: str,
        namespaces: NamespaceThread,
        paths: Paths,
        engines: EngineStore,
    ) -> Self:
        """A driver for the QEMU on this machine; raises `HostFailure` where there is none.

        `cpu` is QEMU's option, which must fit the accelerator.
        Protections that the machine cannot give are named in one line of the log.
        """
        engine = await asyncio.to_thread(installed, engines, paths.installed_engine)
        tsc_khz = None if accelerator == "kvm" else await asyncio.to_thread(host_tsc_khz)
        variant = Variant(Program(()), accelerator, firmware=None, tsc_khz=tsc_khz, cpu=cpu)
        directory = engines.directory(engine.digest)
        qemu = await asyncio.to_thread(_prepared, variant, engine, directory)
        trial = (*qemu.variant.program.argv, "--version")
        devices: tuple[Path, ...] = ()
        if accelerator == "kvm":
            devices = (KVM_DEVICE,)
            give_up_huge_pages()
        confined = await asyncio.to_thread(
            confinement, paths.data_dir, trial, devices, programs=directory
        )
        without: tuple[str, ...] = () if qemu.variant.seccomp else ("QEMU's seccomp filter",)
        if lacks := (*confined.lacks, *without):
            _log.warning("VMs are less protected; see `wrenn doctor`", without=list(lacks))
        return cls(qemu, engines, namespaces, confined)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="qemu",
            version=".".join(map(str, self._qemu.version)),
            accelerator=self._qemu.variant.accelerator,
            own_kernel=True,
            cpu_model=self._cpu_model,
            firmware=self._qemu.variant.firmware or "",
            engine=self._qemu.digest,
            tsc_khz=self._qemu.variant.tsc_khz or 0,
        )

    def _kept(self, digest: str) -> Qemu:
        """One of the QEMUs of this host. Blocks; raises `WrennError`."""
        engine = self._engines.sound(digest)
        directory = self._engines.directory(digest)
        found = self._qemus[digest] = _prepared(self._qemu.variant, engine, directory)
        return found

    async def boot(self, spec: MachineSpec, *, record: Path | None = None) -> Process:
        memory = None
        if record is not None:
            await asyncio.to_thread(make_own, record, spec, spec.memory_mb << 20)
            memory = Memory(str(record), shared=True, read_only_file=False)
        booting = [spec.kernel, spec.initrd]
        running = await self._spawn(self._qemu, spec, memory, [], booting, restore=False)
        failpoints.reach("machine.spawned")
        return self._register(running)

    async def restore(self, spec: MachineSpec, snapshot: Snapshot) -> Process:
        async with beside(snapshot.checked()) as checked:
            try:
                return await self._restore(spec, snapshot, checked)
            except (OSError, WrennError):
                await checked  # which file is damaged says more
                raise

    async def _restore(
        self, spec: MachineSpec, snapshot: Snapshot, checked: "asyncio.Task[None]"
    ) -> Process:
        qemu = self._qemus.get(spec.engine)
        if qemu is None:
            qemu = await asyncio.to_thread(self._kept, spec.engine)
        vmstate = await asyncio.to_thread(os.open, snapshot.vmstate, os.O_RDONLY | os.O_CLOEXEC)
        async with AsyncExitStack() as stack:
            stack.callback(os.close, vmstate)
            memory, fds = await self._base(qemu, spec, stack)
            readable = [Path(memory.path)] if memory.read_only_file else []
            passed = [vmstate, *fds]
            running = await self._spawn(qemu, spec, memory, passed, readable, restore=True)
        failpoints.reach("machine.spawned")
        process = self._register(running)
        try:
            if snapshot.diff is not None:
                await asyncio.to_thread(self._inject, process.pid, spec, snapshot.diff)
                require_same(running)
            await checked
            await unless_ended(running, running.monitor.load(vmstate))
        except BaseException as error:
            await shielded(self._failed(process, error))
            raise
        return process

    async def _failed(self, process: Process, error: BaseException) -> None:
        """End a machine that did not start, and add to a failure what it said."""
        try:
            if isinstance(error, HostFailure):
                error.add_detail(await self.diagnosis(process))
        finally:
            await self.kill(process)

    async def _base(
        self, qemu: Qemu, spec: MachineSpec, stack: AsyncExitStack
    ) -> tuple[Memory, list[int]]:
        """The immutable memory to map privately, and the descriptors to pass on."""
        assert spec.memory is not None
        below = spec.memory_below
        if qemu.version[:2] >= READ_ONLY_BASE_SINCE and below is None:
            return Memory(str(spec.memory), shared=False, read_only_file=True), []
        fd = await stack.enter_async_context(self._sealed.lent(spec.memory, below))
        return Memory(f"/proc/self/fd/{fd}", shared=False, read_only_file=False), [fd]

    async def pause(self, process: Process, spec: MachineSpec, into: Path) -> dict[str, FileDigest]:
        running = self._running[process]
        async with running.lock:
            return await self._pause(running, process, spec, into)

    async def _pause(
        self, running: Running, process: Process, spec: MachineSpec, into: Path
    ) -> dict[str, FileDigest]:
        if await unless_ended(running, running.monitor.status()) in _ENDED:
            raise HostFailure("The guest has stopped")
        state = spec.files.vmstate
        try:
            await asyncio.to_thread(make_own, state, spec)
            with stage("stop"):
                await unless_ended(running, running.monitor.stop())
            failpoints.reach("machine.stopped")
            with stage("capture"):
                await unless_ended(running, running.monitor.save(state))
                failpoints.reach("machine.saved")
                files = await asyncio.to_thread(self._capture, process.pid, spec, state, into)
            require_same(running)
            running.held = True
            return files
        except OSError as error:
            await asyncio.shield(self.unpause(process, spec))
            raise HostFailure("The sandbox could not be stored", detail=str(error)) from error
        except BaseException:
            await asyncio.shield(self.unpause(process, spec))
            raise

    async def unpause(self, process: Process, spec: MachineSpec) -> None:
        running = self._running[process]
        running.held = False
        await unless_ended(running, running.monitor.cont())

    async def add_layer(self, process: Process, spec: MachineSpec, layer: Path) -> None:
        running = self._running[process]
        await unless_ended(running, running.monitor.add_layer(layer))

    async def writes_to(self, process: Process, layer: Path) -> bool:
        running = self._running[process]
        return await unless_ended(running, running.monitor.layer()) == layer.name

    async def stopped(self, process: Process) -> bool:
        running = self._running.get(process)
        if running is None:
            return False
        try:
            await running.monitor.stop()  # of a guest that has stopped: what is not written yet is
        except HostFailure:
            if running.handle.alive:
                raise
            return False
        return True

    async def kill(self, process: Process) -> None:
        running = self._running.pop(process, None)
        if running is not None:
            await end(running)
            if running.private_memory and running.memory is not None:
                await asyncio.to_thread(self._sealed.forget, running.memory)
            await self._remove_group(running.files)
            return
        try:
            handle = ProcessHandle.adopt(process.pid, process.start_time)
        except ProcessLookupError:
            return
        try:
            await handle.kill()
        finally:
            handle.close()

    async def adopt(self, process: Process, spec: MachineSpec) -> bool:
        try:
            handle = ProcessHandle.adopt(process.pid, process.start_time)
        except ProcessLookupError:
            return False
        async with AsyncExitStack() as undo:
            undo.callback(handle.close)
            try:
                monitor = await Monitor.connect(spec.files.control_socket)
                undo.push_async_callback(monitor.close)
                status = await monitor.status()
                if status != "running" and status not in _ENDED:
                    await monitor.cont()
            except HostFailure:
                return False
            await asyncio.to_thread(_rename_disk, spec)
            undo.pop_all()
        running = Running(handle, monitor, spec.files, spec.memory, spec.private_memory)
        running.stopped = status if status in _ENDED else None
        self._running[process] = running
        return True

    async def wait(self, process: Process) -> str:
        running = self._running[process]
        if running.stopped is not None:
            return f"the guest stopped ({running.stopped})"
        stopped = or_no_end(running.monitor.shutdown())
        async with first_of(running.handle.wait(), stopped) as (ended, shutdown):
            if not ended.done():
                reason = f"the guest stopped ({shutdown.result()})"
                await self._keep_console(running)
                return reason
            status = ended.result()
            return "the machine's monitor ended" + ("" if status is None else f" ({status})")

    async def diagnosis(self, process: Process) -> str:
        """The end of the guest's console and of the monitor's own log, for the log."""
        running = self._running.get(process)
        if running is None:
            return ""
        await self._keep_console(running)
        return await asyncio.to_thread(tails, running.files)

    async def close(self) -> None:
        """Let go of all machines; they run on."""
        for running in self._running.values():
            await running.monitor.close()
            running.handle.close()
        self._running.clear()
        self._sealed.close()
        await asyncio.to_thread(self._confinement.close)

    async def tend(self, idle: float) -> None:
        """Also removes control groups that machines have left, and shortens long logs."""
        await asyncio.to_thread(self._trim, idle)
        async with asyncio.TaskGroup() as group:  # a monitor may take its time to answer
            for running in list(self._running.values()):
                group.create_task(_wake(running))

    def _trim(self, idle: float) -> None:
        if self._confinement.groups is not None:
            self._confinement.groups.sweep()
        running = list(self._running.values())
        for each in running:
            shorten_log(each.files.vmm_log)
        self._sealed.trim(idle, {each.memory for each in running if each.memory is not None})

    async def _remove_group(self, files: MachineFiles) -> None:
        if self._confinement.groups is not None:
            await asyncio.to_thread(self._confinement.groups.remove, files.directory.name)

    def _register(self, running: Running) -> Process:
        process = Process(running.handle.pid, running.handle.start_time)
        self._running[process] = running
        return process

    async def _spawn(
        self,
        qemu: Qemu,
        spec: MachineSpec,
        memory: Memory | None,
        fds: Sequence[int],
        readable: Sequence[Path] = (),
        *,
        restore: bool,
    ) -> Running:
        async with AsyncExitStack() as stack:
            socket_path = spec.files.control_socket
            listener = stack.enter_context(await asyncio.to_thread(listen, socket_path))
            passed = [listener.fileno(), *fds]
            tap: int | None = None
            if spec.slot.netns is not None:
                tap = await open_tap(self._namespaces, spec.slot)
                stack.callback(os.close, tap)
                passed.append(tap)
            log = stack.enter_context(spec.files.vmm_log.open("ab"))
            below = await asyncio.to_thread(depth, spec.files.overlay)
            qmp, variant = listener.fileno(), qemu.variant
            argv = command(variant, spec, memory, below, qmp_fd=qmp, tap_fd=tap, restore=restore)
            handle = await launch(
                self._confinement,
                spec,
                argv,
                programs=qemu.directory,
                environment=variant.program.environment,
                readable=readable,
                pass_fds=passed,
                output=log,
                groups=kvm_groups() if variant.accelerator == "kvm" else (),
                extra_mb=TRANSLATION_CACHE_MB,
            )
        try:
            monitor = await connected(handle, socket_path, qemu.version)
        except BaseException as error:
            await asyncio.shield(handle.kill())
            handle.close()
            await self._remove_group(spec.files)
            if isinstance(error, HostFailure):
                error.add_detail(await asyncio.to_thread(tails, spec.files))
            raise
        return Running(handle, monitor, spec.files, spec.memory, spec.private_memory)

    def _mapping(self, pid: int, spec: MachineSpec) -> pages.Mapping:
        """Where the machine has its image; one that was adopted may be of another QEMU."""
        assert spec.memory is not None
        size = spec.memory_mb << 20
        try:
            return pages.find_mapping(pid, self._sealed.name(spec.memory), size)
        except LookupError:
            return pages.find_mapping(pid, str(spec.memory), size)

    def _inject(self, pid: int, spec: MachineSpec, directory: Path) -> None:
        try:
            diff.inject(self._mapping(pid, spec), directory)
        except (OSError, LookupError) as error:
            raise HostFailure("The sandbox could not be loaded", detail=str(error)) from error

    def _capture(
        self, pid: int, spec: MachineSpec, state: Path, into: Path
    ) -> dict[str, FileDigest]:
        data = read_state(state)
        (into / VMSTATE).write_bytes(data)
        state.unlink()
        files = {VMSTATE: FileDigest(len(data), blake3=blake3(data).hexdigest())}
        if spec.memory is not None:
            try:
                files |= diff.capture(self._mapping(pid, spec), into)
            except LookupError as error:
                raise HostFailure("The sandbox could not be stored", detail=str(error)) from error
        return files

    async def console(self, process: Process) -> bytes:
        running = self._running.get(process)
        if running is None:
            return b""
        await self._keep_console(running)
        text, running.heard = running.heard, b""
        return text

    async def _keep_console(self, running: Running) -> None:
        """Move what the guest has written to a file of bounded length, for a diagnosis."""
        with contextlib.suppress(HostFailure, OSError):
            text = await running.monitor.console()
            if text:
                running.heard = (running.heard + text)[-CONSOLE_BYTES:]
                await asyncio.to_thread(shorten_log, running.files.console)
                await asyncio.to_thread(append, running.files.console, text)


def _prepared(variant: Variant, engine: Engine, directory: Path) -> Qemu:
    """A kept QEMU, as machines like those of `variant` are started with it. Blocks."""
    kept = program(directory, engine)
    version = version_of(kept)
    firmware = "qboot.rom" if version[:2] >= _QBOOT_SINCE else None
    seccomp = has_seccomp(kept)
    variant = replace(variant, program=kept, firmware=firmware, seccomp=seccomp)
    return Qemu(variant, version, engine.digest, directory)


async def _wake(running: Running) -> None:
    """Let a machine go on that a full disk has stopped, unless it is being stored."""
    if running.lock.locked() or running.held:
        return
    try:
        async with running.lock:
            if await running.monitor.status() != _DISK_FULL:
                return
            await running.monitor.cont()
        _log.warning("the disk was full", machine=running.files.directory.name)
    except HostFailure as error:
        detail = str(error)
        _log.warning("not woken", machine=running.files.directory.name, detail=detail)


def _rename_disk(spec: MachineSpec) -> None:
    """Give the disk layer its name of today, and its monitor a link by the name it was given."""
    layer = spec.files.overlay
    former = layer.with_name(_FORMER_DISK)
    if not former.exists() or former.is_symlink():
        return
    link = layer.with_name("link")
    with contextlib.suppress(FileExistsError):
        os.link(former, layer)
    link.unlink(missing_ok=True)
    link.symlink_to(layer.name)
    link.replace(former)
