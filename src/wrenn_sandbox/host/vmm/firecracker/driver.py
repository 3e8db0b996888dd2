"""The Firecracker driver.

A machine's directory is the working directory of its Firecracker. All that a snapshot remembers of
paths is relative to it, so a restored machine finds its own files under the same names:

    disk                the guest's disk
    runtime             a link to the runtime image
    api/socket          the API
    vmstate             device state, while it is written or loaded
    kernel              while the guest boots
    pages.sock          where memory is handed to the page server
    memory.idx          which pages of a machine that a page server serves were not the image's
    memory.diff         those pages
    lost                why the server ended it, before it does
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Self

import structlog
from blake3 import blake3

from wrenn_sandbox.aio import beside, shielded
from wrenn_sandbox.errors import HostFailure, IncompatibleImage
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.host.disk.raw import Raw
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.images.manifest import VMSTATE, FileDigest
from wrenn_sandbox.host.memory import diff, pages
from wrenn_sandbox.host.memory.base_image import SealedMemories
from wrenn_sandbox.host.memory.page_server import GuestMemory, PageServer
from wrenn_sandbox.host.paths import IMMUTABLE_FILE, Paths
from wrenn_sandbox.host.privileged.confinement import Confinement, confinement
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.privileged.spawn import give_up_huge_pages, kvm_groups
from wrenn_sandbox.host.privileged.tap import TUN_DEVICE, bring_up
from wrenn_sandbox.host.probe import KVM_DEVICE, cpu_model
from wrenn_sandbox.host.slot import GUEST_MAC
from wrenn_sandbox.host.stages import stage
from wrenn_sandbox.host.vmm.base import Capabilities, Driver, MachineSpec, Process, Snapshot
from wrenn_sandbox.host.vmm.files import make_own, read_state, shorten_log, tails
from wrenn_sandbox.host.vmm.launch import group_of, launch

from .api import ANSWER_SEC, Api, Declined
from .binary import VMM, Firecracker, installed
from .kernel import unpack
from .process import (
    API_SOCKET,
    Running,
    console_of,
    known_loss,
    listening,
    make_api_directory,
    read_end,
    seal_api_directory,
    unless_ended,
    until_end,
)

_log = structlog.get_logger(__name__)

_USERFAULTFD: Final = Path("/dev/userfaultfd")
"""Since Linux 6.1."""
_RUNTIME: Final = "runtime"
_KERNEL: Final = "kernel"
_DISK: Final = "root"
_NETWORK: Final = "eth0"
_NO_MEMORY_FILE: Final = f"{VMSTATE}/none"
"""A path that cannot be opened. Firecracker writes the device state first, then memory: what
differs from the image is read from the process instead, and nothing else is written."""
_NO_SUCH_FILE: Final = "memory backing file"
"""What it says then."""
SERVED_BYTES: Final = 64 << 20
"""Of stored pages: a page server pays from so many on."""
_WRITTEN_MB_PER_SEC: Final = 20.0
"""How slow a disk may be that memory is written to."""
_REFILL_MS: Final = 1000
_REPLACED: Final = "An engine of this host is damaged: it is Firecracker of another version"


class FirecrackerDriver(Driver):
    """Machines are processes of their slot's user; sockets and logs are in their directory.

    Each is started with the Firecracker that has stored what it continues. `firecracker` is the
    one of this host: it boots machines.
    """

    disk_format = Raw()

    def __init__(
        self,
        firecracker: Firecracker,
        engines: EngineStore,
        namespaces: NamespaceThread,
        confined: Confinement,
    ) -> None:
        self._firecracker = firecracker
        self._known = dict.fromkeys(("", firecracker.digest), firecracker)
        self._engines = engines
        self._namespaces = namespaces
        self._confinement = confined
        self._serves = confined.jail is not None and _USERFAULTFD.exists()
        """A page server can give VMs their memory: they may open the device for it."""
        self._sealed = SealedMemories()
        self._running: dict[Process, Running] = {}
        self._cpu_model = cpu_model()

    @classmethod
    async def create(
        cls, named: Path | None, namespaces: NamespaceThread, paths: Paths, engines: EngineStore
    ) -> Self:
        """A driver for the binary that is `named` or found; raises `HostFailure` where none fits.

        KVM must have been found to work. Protections that the machine cannot give are named in one
        line of the log.
        """
        note = paths.installed_engine
        firecracker = await asyncio.to_thread(installed, engines, note, named)
        give_up_huge_pages()
        serving = (_USERFAULTFD,) if _USERFAULTFD.exists() else ()
        confined = await asyncio.to_thread(
            confinement,
            paths.data_dir,
            (str(firecracker.program), "--version"),
            opened=(KVM_DEVICE, TUN_DEVICE, *serving),
            programs=firecracker.directory,
        )
        if confined.lacks:
            _log.warning("VMs are less protected; see `wrenn doctor`", without=list(confined.lacks))
        return cls(firecracker, engines, namespaces, confined)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name=VMM,
            version=self._firecracker.version,
            accelerator="kvm",
            own_kernel=True,
            cpu_model=self._cpu_model,
            engine=self._firecracker.digest,
        )

    def _kept(self, digest: str) -> Firecracker:
        """One of the Firecrackers of this host. Blocks; raises `WrennError`."""
        if digest not in self._known:
            self._known[digest] = Firecracker.of(self._engines, self._engines.sound(digest))
        return self._known[digest]

    async def boot(self, spec: MachineSpec, *, record: Path | None = None) -> Process:
        try:
            await asyncio.to_thread(_unpack_kernel, spec)
            if record is not None:
                await asyncio.to_thread(make_own, record, spec, spec.memory_mb << 20)
        except OSError as error:
            raise HostFailure("The machine did not start", detail=str(error)) from error
        running = await self._spawn(self._firecracker, spec, [spec.initrd])
        running.record = record
        kernel = spec.files.directory / _KERNEL
        return await self._begun(running, self._boot(running, spec), kernel)

    async def _boot(self, running: Running, spec: MachineSpec) -> None:
        put = partial(running.api.call, "PUT")
        machine = {
            "vcpu_count": spec.vcpus,
            "mem_size_mib": spec.memory_mb,
            "track_dirty_pages": running.record is not None,
        }
        await put("/machine-config", machine)
        boot = {
            "kernel_image_path": _KERNEL,
            "initrd_path": str(spec.initrd),
            "boot_args": spec.kernel_args,
        }
        await put("/boot-source", boot)
        disk = {"drive_id": _DISK, "path_on_host": spec.files.overlay.name, "is_read_only": False}
        shared = {"drive_id": _RUNTIME, "path_on_host": _RUNTIME, "is_read_only": True}
        disk["rate_limiter"] = _rate_limiter(spec)
        for drive in (disk, shared):
            whole = {**drive, "is_root_device": False, "cache_type": "Unsafe"}
            await put(f"/drives/{drive['drive_id']}", whole)
        network = {"iface_id": _NETWORK, "host_dev_name": spec.slot.tap, "guest_mac": GUEST_MAC}
        await put(f"/network-interfaces/{_NETWORK}", network)
        await put("/entropy", {})
        await self._bring_up(spec)
        await put("/actions", {"action_type": "InstanceStart"}, ANSWER_SEC)

    async def restore(self, spec: MachineSpec, snapshot: Snapshot) -> Process:
        firecracker = await asyncio.to_thread(self._kept, spec.engine)
        async with beside(snapshot.checked()) as checked:
            try:
                served = await asyncio.to_thread(_put, spec, snapshot, self._serves)
                async with self._base(spec) as (base, fds):
                    readable = () if served or fds else (base,)
                    running = await self._spawn(firecracker, spec, readable, fds)
                    running.backing = base
                    load = self._load(running, spec, snapshot, served, checked)
                    return await self._begun(running, load, spec.files.vmstate)
            except (HostFailure, IncompatibleImage, OSError):
                await checked  # it knows best what is wrong with what was stored
                raise

    @asynccontextmanager
    async def _base(self, spec: MachineSpec) -> AsyncIterator[tuple[Path, tuple[int, ...]]]:
        """The image's memory for the time of a block: a file, here and in a process that has been
        given these descriptors.
        """
        assert spec.memory is not None
        if spec.memory_below is None:
            yield spec.memory, ()
            return
        async with self._sealed.lent(spec.memory, spec.memory_below) as fd:
            yield Path(f"/proc/self/fd/{fd}"), (fd,)

    async def _load(
        self,
        running: Running,
        spec: MachineSpec,
        snapshot: Snapshot,
        served: bool,
        checked: "asyncio.Task[None]",
    ) -> None:
        if not served:
            backend = {"backend_type": "File", "backend_path": str(running.backing)}
            await self._continue(running, spec, backend, snapshot.diff, checked)
            return
        running.pages = await self._page_server(spec)
        running.pages.serve(running.process)
        backend = {"backend_type": "Uffd", "backend_path": spec.files.pages_socket.name}
        await running.pages.unless_ended(self._continue(running, spec, backend, None, checked))

    async def _continue(
        self,
        running: Running,
        spec: MachineSpec,
        backend: dict[str, str],
        pages_in: Path | None,
        checked: "asyncio.Task[None]",
    ) -> None:
        """Load the snapshot and run its guest, once the pages in a directory are put in."""
        await asyncio.shield(checked)  # the end of this call alone is no end of the check
        load = {"snapshot_path": spec.files.vmstate.name, "mem_backend": backend}
        await running.api.call("PUT", "/snapshot/load", load, ANSWER_SEC)
        if pages_in is not None:
            async with self._base(spec) as (base, _):
                await asyncio.to_thread(_inject, running, spec, pages_in, base)
        if running.pages is not None:
            await running.pages.connected()
        limits = {"drive_id": _DISK, "rate_limiter": _rate_limiter(spec)}
        await running.api.call("PATCH", f"/drives/{_DISK}", limits)
        await self._bring_up(spec)
        await running.api.resume()

    async def _page_server(self, spec: MachineSpec) -> PageServer:
        """One for the image and what is stored over it; raises `HostFailure`."""
        group: int | None = None
        try:
            if self._confinement.groups is not None:
                group = await asyncio.to_thread(group_of, self._confinement.groups, spec)
            jail = self._confinement.jail
            async with self._base(spec) as (base, _):
                memory = GuestMemory(base, spec.files.directory)
                return await PageServer.start(spec.slot, spec.files, memory, jail=jail, group=group)
        finally:
            if group is not None:
                os.close(group)

    async def _bring_up(self, spec: MachineSpec) -> None:
        """Let the tap carry packets, now that Firecracker has attached to it."""
        assert spec.slot.tap is not None
        try:
            await self._namespaces.run(spec.slot.netns, partial(bring_up, spec.slot.tap))
        except OSError as error:
            raise HostFailure("The tap of the slot cannot be used", detail=str(error)) from error

    async def _begun(
        self, running: Running, start: Coroutine[None, None, None], used: Path
    ) -> Process:
        """The machine of a process once it runs, and the file that it has `used` is removed.

        After a failure the process is ended.
        """
        failpoints.reach("machine.spawned")
        handle = running.handle
        assert handle is not None
        process = Process(handle.pid, handle.start_time)
        self._running[process] = running
        try:
            await unless_ended(handle, start)
            await asyncio.to_thread(used.unlink)
        except BaseException as error:
            await shielded(self._failed(process, error))
            raise
        return process

    async def _failed(self, process: Process, error: BaseException) -> None:
        """End the process of a machine that did not start."""
        try:
            if isinstance(error, HostFailure):
                error.add_detail(await self.diagnosis(process))
        finally:
            await self.kill(process)

    async def _spawn(
        self,
        firecracker: Firecracker,
        spec: MachineSpec,
        readable: Sequence[Path],
        fds: Sequence[int] = (),
    ) -> Running:
        """A Firecracker that answers. Its console is a pipe, which it keeps open itself: no server
        need be there to read it, and what does not fit is lost. The server reads from an end of its
        own: that a captured one makes its end block is of no effect."""
        files = spec.files
        await asyncio.to_thread(_prepare, spec)
        kept, output = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            argv = [str(firecracker.program), "--id", files.directory.name]
            argv += ["--api-sock", API_SOCKET, "--log-path", str(files.vmm_log), "--level", "Info"]
            handle = await launch(
                self._confinement,
                spec,
                argv,
                programs=firecracker.directory,
                readable=readable,
                pass_fds=(kept, *fds),
                output=output,
                groups=kvm_groups(),
            )
            console = read_end(f"/proc/self/fd/{kept}")
        finally:
            os.close(kept)
            os.close(output)
        api = Api(files.directory / API_SOCKET, handle.pid)
        running = Running(handle, api, files, console, spec.memory)
        try:
            await listening(handle, api)
            await asyncio.to_thread(seal_api_directory, files)
            version = await unless_ended(handle, api.version())
            if version.partition("-")[0] != firecracker.version:
                raise HostFailure(_REPLACED)
        except BaseException as error:
            await shielded(self._end(running))
            if isinstance(error, HostFailure):
                error.add_detail(await asyncio.to_thread(tails, files))
            raise
        return running

    async def pause(self, process: Process, spec: MachineSpec, into: Path) -> dict[str, FileDigest]:
        running = self._running[process]
        handle = running.process
        try:
            await asyncio.to_thread(make_own, spec.files.vmstate, spec)
            with stage("stop"):
                await unless_ended(handle, running.api.pause())
            failpoints.reach("machine.stopped")
            with stage("capture"):
                await unless_ended(handle, _save(running, spec))
                failpoints.reach("machine.saved")
                files = await self._capture(running, handle.pid, spec, into)
            _ = running.process
            return files
        except (OSError, LookupError) as error:
            await asyncio.shield(self.unpause(process, spec))
            raise HostFailure("The sandbox could not be stored", detail=str(error)) from error
        except BaseException:
            await asyncio.shield(self.unpause(process, spec))
            raise

    async def _capture(
        self, running: Running, pid: int, spec: MachineSpec, into: Path
    ) -> dict[str, FileDigest]:
        if running.pages is None:
            return await asyncio.to_thread(_capture, running, pid, spec, spec.memory, into)
        async with self._base(spec) as (base, _):
            return await asyncio.to_thread(_capture, running, pid, spec, base, into)

    async def unpause(self, process: Process, spec: MachineSpec) -> None:
        running = self._running[process]
        await unless_ended(running.process, running.api.resume())

    async def stopped(self, process: Process) -> bool:
        running = self._running.get(process)
        return running is not None and await asyncio.to_thread(running.ended_well)

    async def kill(self, process: Process) -> None:
        running = self._running.pop(process, None)
        if running is not None:
            await self._end(running)
            return
        try:
            handle = ProcessHandle.adopt(process.pid, process.start_time)
        except ProcessLookupError:
            return
        try:
            await handle.kill()
        finally:
            handle.close()

    async def _end(self, running: Running) -> None:
        try:
            if running.handle is not None:
                await running.handle.kill()
            if running.pages is not None:
                await running.pages.close()
        finally:
            await asyncio.to_thread(running.keep_console)
            running.close()
        if self._confinement.groups is not None:
            name = running.files.directory.name
            await asyncio.to_thread(self._confinement.groups.remove, name)

    async def adopt(self, process: Process, spec: MachineSpec) -> bool:
        api = Api(spec.files.directory / API_SOCKET, process.pid)
        lost = await asyncio.to_thread(known_loss, spec.files)
        try:
            handle = ProcessHandle.adopt(process.pid, process.start_time)
        except ProcessLookupError:
            ended = Running(None, api, spec.files, lost=lost)
            if await asyncio.to_thread(ended.ended_well):
                self._running[process] = ended
                return True
            return False
        running = Running(handle, api, spec.files, memory=spec.memory, lost=lost)
        try:
            if not lost and await asyncio.to_thread(spec.files.page_server.exists):
                running.pages = await PageServer.adopt(spec.files)
                if running.pages is None:
                    await asyncio.to_thread(running.lose, "the page server ended")
            if running.lost:
                running.status = await handle.kill()
            else:
                await unless_ended(handle, api.resume())
        except BaseException as error:
            running.close()
            if isinstance(error, HostFailure):
                return False
            raise
        running.console = await asyncio.to_thread(console_of, process.pid)
        self._running[process] = running
        return True

    async def wait(self, process: Process) -> str:
        running = self._running[process]
        if running.handle is not None and not running.lost:
            await until_end(running, running.handle)
        if running.lost:
            return running.lost
        if await asyncio.to_thread(running.ended_well):
            return "the guest stopped"
        status = "" if running.status is None else f" ({running.status})"
        return f"the machine's monitor ended{status}"

    async def diagnosis(self, process: Process) -> str:
        """The end of the guest's console and of Firecracker's log, for the log."""
        running = self._running.get(process)
        return "" if running is None else await asyncio.to_thread(running.diagnosis)

    async def console(self, process: Process) -> bytes:
        running = self._running.get(process)
        return b"" if running is None else await asyncio.to_thread(running.take_console)

    async def close(self) -> None:
        """Let go of all machines; they run on."""
        for running in self._running.values():
            running.close()
        self._running.clear()
        self._sealed.close()
        await asyncio.to_thread(self._confinement.close)

    async def tend(self, idle: float) -> None:
        """Keeps consoles, shortens long logs, and removes control groups that machines left."""
        found = self._running.values()
        alive = [each for each in found if each.handle is not None and each.handle.alive]
        self._sealed.trim(idle, {each.memory for each in alive if each.memory is not None})
        await asyncio.to_thread(self._tidy, alive)

    def _tidy(self, running: Sequence[Running]) -> None:
        """Logs first: they grow without bound. What cannot be done for one keeps no other back.

        The log of one that has ended is left alone: it says how.
        """
        for each in running:
            try:
                shorten_log(each.files.vmm_log)
            except OSError as error:
                machine = each.files.directory.name
                _log.warning("a log is not shortened", machine=machine, detail=str(error))
        for each in running:
            each.keep_console()
        if self._confinement.groups is not None:
            self._confinement.groups.sweep()


def _prepare(spec: MachineSpec) -> None:
    """What each Firecracker needs in the machine's directory; blocks."""
    (spec.files.directory / _RUNTIME).symlink_to(spec.runtime)
    make_own(spec.files.vmm_log, spec)
    make_api_directory(spec.files, spec.slot)


def _unpack_kernel(spec: MachineSpec) -> None:
    path = spec.files.directory / _KERNEL
    path.write_bytes(unpack(spec.kernel.read_bytes()))
    path.chmod(IMMUTABLE_FILE)


def _put(spec: MachineSpec, snapshot: Snapshot, serves: bool) -> bool:
    """Give the machine what it is loaded from; whether a page server has its pages. Blocks.

    That is so where many differ from the image, if there can be one.
    """
    make_own(spec.files.vmstate, spec, data=snapshot.vmstate.read_bytes())
    if not serves or snapshot.diff is None:
        return False
    if (snapshot.diff / diff.PAGES).stat().st_size < SERVED_BYTES:
        return False
    shutil.copyfile(snapshot.diff / diff.INDEX, spec.files.directory / diff.INDEX)
    os.link(snapshot.diff / diff.PAGES, spec.files.directory / diff.PAGES)
    return True


def _inject(running: Running, spec: MachineSpec, directory: Path, base: Path) -> None:
    """Put stored pages into a loaded machine; blocks.

    Firecracker has written to some already: where the guest looks for the number of its generation.
    """
    try:
        diff.inject(_mapped(running.process.pid, spec), directory, base)
        _ = running.process
    except (OSError, LookupError) as error:
        raise HostFailure("The sandbox could not be loaded", detail=str(error)) from error


async def _save(running: Running, spec: MachineSpec) -> None:
    """Have the device state of a stopped machine written, and its memory if it goes to a file."""
    state = {"snapshot_path": spec.files.vmstate.name}
    if running.record is not None:
        whole = {**state, "mem_file_path": str(running.record), "snapshot_type": "Diff"}
        seconds = ANSWER_SEC + spec.memory_mb / _WRITTEN_MB_PER_SEC
        await running.api.call("PUT", "/snapshot/create", whole, seconds)
        return
    alone = {**state, "mem_file_path": _NO_MEMORY_FILE, "snapshot_type": "Full"}
    try:
        await running.api.call("PUT", "/snapshot/create", alone, ANSWER_SEC)
    except Declined as error:
        if _NO_SUCH_FILE not in (error.detail or ""):
            raise


def _mapped(pid: int, spec: MachineSpec) -> list[pages.Mapping]:
    """Where a machine has its image, or the sealed copy of that; raises LookupError."""
    assert spec.memory is not None
    name = str(spec.memory) if spec.memory_below is None else SealedMemories.name(spec.memory)
    return pages.find_pieces(pid, name, spec.memory_mb << 20)


def _capture(
    running: Running, pid: int, spec: MachineSpec, base: Path | None, into: Path
) -> dict[str, FileDigest]:
    """Store device state and, of a machine that continues another, its own pages; blocks.

    They are over the image's memory, `base`.
    """
    data = read_state(spec.files.vmstate)
    (into / VMSTATE).write_bytes(data)
    spec.files.vmstate.unlink()
    files = {VMSTATE: FileDigest(len(data), blake3=blake3(data).hexdigest())}
    if base is None:
        return files
    if running.pages is not None:
        mappings = running.pages.mappings(pid, spec.memory_mb << 20)
        return files | diff.capture_served(mappings, base, spec.files.directory, into)
    return files | diff.capture(_mapped(pid, spec), into)


def _rate_limiter(spec: MachineSpec) -> dict[str, dict[str, int]]:
    """What the guest may use its disk for each second; a bucket of no size bounds nothing."""
    bounds = {"bandwidth": spec.disk_bytes_per_sec, "ops": spec.disk_operations_per_sec}
    return {
        name: {"size": bound, "refill_time": _REFILL_MS if bound else 0}
        for name, bound in bounds.items()
    }
