"""The actor of one sandbox: running as a machine, or stored on disk.

One operation at a time. An operation that fails leaves the sandbox as it was before; `destroy`
cancels whatever is under way. What is acknowledged is on disk first.
"""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog

from wrenn_sandbox.aio import completed, in_thread
from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    HostFailure,
    IncompatibleImage,
    InvalidState,
    NoCapacity,
    NotFound,
    WrennError,
)
from wrenn_sandbox.host.images.manifest import FileDigest, HardwareProfile, Manifest
from wrenn_sandbox.host.images.staging import take
from wrenn_sandbox.ids import ImageId, OperationId, SandboxId
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.wire.messages import Phase, Placement
from wrenn_sandbox.wire.metrics import Path as Start

from . import admission, compatibility, failpoints, merging, paused, snapshots
from .context import HostContext
from .disk_use import Holding, Layers, held_open
from .history.log import SandboxLog
from .images import manifest as form
from .journal import Record
from .launch_source import LaunchSource, paused_source, source_of, without_memory
from .machine import Machine
from .paused import PausedSandbox
from .pools import Pool
from .slot import Slot
from .stages import stage

_log = structlog.get_logger(__name__)

_WAY_OUT: Final = (
    "Its files can be had: resume it without memory "
    '(`wrenn sandbox resume --reboot`, or {"memory": false} in the request); its processes end'
)
_STOPPED: Final = "The sandbox's guest stopped by itself, so only its disk is stored."
_NO_START: Final = (
    "The sandbox did not start from its disk, whose file system may be damaged; it is stored as it "
    "was"
)


_MOST_ADDED_LAYERS: Final = 32
"""What a VMM has open grows with each, and housekeeping cannot merge what it has open."""
_MANY_LAYERS: Final = (
    "The sandbox was checkpointed many times since it was started; pause and resume it first"
)
_MUCH_HELD: Final = (
    "Disk layers that were merged since the sandbox was started take too much room still; pause and"
    " resume it first"
)
_NO_SPACE: Final = "The host has no disk space left for another sandbox"


class Sandbox:
    """`on_exit` is called with the reason when a running machine ends by itself."""

    def __init__(
        self, context: HostContext, sandbox_id: SandboxId, on_exit: Callable[["Sandbox", str], None]
    ) -> None:
        self.sandbox_id = sandbox_id
        self.operation_id: OperationId | None = None
        self._context = context
        self._on_exit = on_exit
        self._lock = asyncio.Lock()
        self._operation: asyncio.Task[object] | None = None
        self._machine: Machine | None = None
        self._stored: PausedSandbox | None = None
        self._damage: IncompatibleImage | None = None
        self._starting_from: ImageId | None = None
        self._gone = False
        self.log = SandboxLog(context.paths.history(sandbox_id))

    @property
    def phase(self) -> Phase:
        if self._machine is not None:
            return Phase.RUNNING
        is_stored = self._stored is not None or self._damage is not None
        return Phase.PAUSED if is_stored else Phase.STARTING

    @property
    def is_damaged(self) -> bool:
        """Whether what is stored cannot be read, so that nobody knows what it needs."""
        return self._damage is not None

    @property
    def busy(self) -> bool:
        """Whether an operation is under way."""
        return self._lock.locked()

    @property
    def machine(self) -> Machine:
        """The running machine; raises `NotFound` while there is none."""
        if self._machine is None:
            raise NotFound("The sandbox is not running")
        return self._machine

    @property
    def memory_mb(self) -> int:
        """The guest's memory in MiB, 0 where that is not known."""
        if self._stored is not None:
            return self._stored.machine.memory_mb
        return 0 if self._machine is None else self._machine.record.memory_mb

    @property
    def stored(self) -> PausedSandbox | None:
        """What is stored and may be resumed."""
        return self._stored

    @property
    def layers(self) -> tuple[int, ...]:
        """The generations whose disks its own builds on, oldest first; nothing writes to them."""
        if self._stored is not None:
            return self._stored.layers
        return self._machine.record.layers if self._machine is not None else ()

    @property
    def image_id(self) -> ImageId | None:
        """The image that its memory is over; none before it was ever started."""
        if self._stored is not None:
            return self._stored.image_id
        return self._machine.record.image_id if self._machine is not None else None

    def disk_layers(self, disk_mb: int) -> Layers:
        """What the layers of its disk take; blocks. Raises OSError."""
        newest = () if self._stored is None else (self._stored.generation,)
        older, top = (
            paused.disks(self._context.paths, self.sandbox_id, each)
            for each in (self.layers, newest)
        )
        return Layers.of(disk_mb, older, top)

    @property
    def holding(self) -> Holding:
        """What it takes disk space with."""
        machine_id = None if self._machine is None else self._machine.record.machine_id
        return Holding(self.sandbox_id, machine_id, self.image_id)

    @property
    def engines(self) -> set[str]:
        """The kept engines that its machine runs on; what is stored names its own."""
        running = set() if self._machine is None else {self._machine.record.engine}
        return running - {""}

    @property
    def image_ids(self) -> set[ImageId]:
        """The images that the sandbox needs."""
        needed = set()
        if self._machine is not None:
            needed.add(self._machine.record.image_id)
        if self._stored is not None:
            needed.add(self._stored.image_id)
        if not needed and self._starting_from is not None:
            needed.add(self._starting_from)
        return needed

    def own(self, machine: Machine) -> None:
        """Become the owner of a machine that runs, such as an adopted one."""
        self._machine = machine
        self.operation_id = machine.record.operation_id
        machine.on_exit = self._exited
        machine.log = self.log
        if machine.ended is not None:
            self._exited(machine.ended)

    def own_stored(self, manifest: PausedSandbox) -> None:
        """Become the owner of what is stored."""
        self._stored = manifest

    def own_damaged(self, damage: IncompatibleImage) -> None:
        """Become the owner of something stored that cannot be read; it is kept as it is."""
        self._damage = damage

    async def start(
        self,
        operation_id: OperationId,
        image: Manifest,
        policy: NetworkPolicy,
        envs: dict[str, str],
        pool: Pool | None = None,
    ) -> Placement:
        """Continue an image's snapshot as this sandbox's machine, one of the pool's if it can."""
        self.operation_id = operation_id
        self._starting_from = image.image_id
        async with self._exclusive():
            engine = compatibility.require_image(self._context, image)
            while pool is not None and (machine := pool.take(image.image_id)) is not None:
                async with AsyncExitStack() as undo:
                    undo.push_async_callback(machine.release)
                    try:
                        await self._take(machine, policy, envs)
                    except WrennError as error:
                        _log.warning("a machine of the pool failed", detail=error.detail)
                        continue
                    undo.pop_all()
                return msgspec.structs.replace(machine.placement, path=Start.HOT)
            return await self._launch(source_of(self._context, image, engine), policy, envs)

    async def begin_stored(self, image: Manifest, reason: str) -> None:
        """Be stored with the disk of an image, and without its memory for this reason."""
        self._starting_from = image.image_id
        async with self._exclusive():
            made = partial(self._begin_stored, image, reason)
            self._stored = await completed(asyncio.to_thread(made))

    def _begin_stored(self, image: Manifest, reason: str) -> PausedSandbox:
        context, paths = self._context, self._context.paths
        compatibility.require_driver(context, compatibility.started_as(image))
        disk = paused.stage(paths, self.sandbox_id, 1) / form.DISK
        below, room = context.store.below(image), partial(admission.require_room, context.settings)
        context.driver.disk_format.create(disk, below, image.disk_size, room=room)
        manifest = PausedSandbox(
            sandbox_id=self.sandbox_id,
            generation=1,
            created_at=context.clock(),
            image_id=image.image_id,
            machine=compatibility.started_as(image),
            token="",
            disk_mb=image.disk_mb,
            files={form.DISK: paused.describe(disk)},
            stopped=reason,
        )
        paused.commit(paths, manifest)
        return manifest

    async def resume(
        self, operation_id: OperationId, policy: NetworkPolicy, envs: dict[str, str] | None = None
    ) -> Placement:
        """Continue the stored machine; on failure it stays stored, untouched."""
        async with self._exclusive():
            manifest, image = await self._sound_disk()
            self.operation_id = operation_id
            paths = self._context.paths
            if manifest.stopped:
                raise InvalidState(f"{_STOPPED} {_WAY_OUT}")
            with _way_out():
                await asyncio.to_thread(self._context.store.open_sound, manifest.image_id)
                engine = compatibility.require_stored(self._context, manifest, image)
                failpoints.reach("resume.checked")
                source = replace(paused_source(self._context, manifest, image), engine=engine)
                share = partial(paused.share_disks, paths, self.sandbox_id, source.layers)
                async with AsyncExitStack() as undo:
                    undo.push_async_callback(asyncio.to_thread, self._withdraw, source)
                    placement = await self._launch(
                        source, policy, envs, lambda slot: share(slot.uid)
                    )
                    undo.pop_all()
            self._stored = None
            await asyncio.to_thread(paused.consume, paths, manifest)
            if not source.layers:
                await asyncio.to_thread(paused.keep, paths, self.sandbox_id, ())
            failpoints.reach("resume.consumed")
            return placement

    async def _sound_disk(self) -> tuple[PausedSandbox, Manifest]:
        """What is stored, when a machine may be put on its disk, and the image below."""
        if self._damage is not None:
            raise self._damage
        manifest, context = self._stored, self._context
        if manifest is None:
            raise NotFound("The sandbox is not stored")
        image = await asyncio.to_thread(context.store.open, manifest.image_id)
        await asyncio.to_thread(paused.check_disk, context.paths, manifest)
        layers = await asyncio.to_thread(self.disk_layers, manifest.disk_mb)
        compatibility.require_bounded(context, layers)
        await asyncio.to_thread(compatibility.require_disks, context, manifest, image)
        return manifest, image

    def _withdraw(self, source: LaunchSource) -> None:
        paused.withdraw_disks(self._context.paths, self.sandbox_id, source.layers)

    async def reboot(self, image_id: ImageId, reason: str = "") -> None:
        """Boot a guest from the stored disk, and store what it is then instead of what it was.

        Processes and all else in memory are gone. `image_id` becomes the private image that holds
        the new memory. Only the disk has to fit this host. The next resume tells of the `reason`.
        On failure what is stored stays as it is: `HostFailure` where the guest does not start from
        its disk.
        """
        async with self._exclusive():
            manifest, image = await self._sound_disk()
            failpoints.reach("reboot.checked")
            await self._reboot(manifest, image, image_id, reason)
            failpoints.reach("reboot.committed")
            paths, layers = self._context.paths, self.layers
            await asyncio.to_thread(paused.strip, paths, self.sandbox_id, layers)
            failpoints.reach("reboot.done")

    async def _reboot(
        self, manifest: PausedSandbox, image: Manifest, image_id: ImageId, reason: str
    ) -> None:
        context, paths, generation = self._context, self._context.paths, manifest.generation + 1
        source = without_memory(paused_source(context, manifest, image))
        hardware = compatibility.hardware(context, source.vcpus, source.memory_mb, image)
        share = partial(paused.share_disks, paths, self.sandbox_id, source.layers)
        async with AsyncExitStack() as stack:
            made = stack.enter_context(context.store.staging())
            stack.push_async_callback(
                asyncio.to_thread, paused.unstage, paths, self.sandbox_id, generation
            )
            staged = await asyncio.to_thread(paused.stage, paths, self.sandbox_id, generation)
            stack.push_async_callback(asyncio.to_thread, self._withdraw, source)
            machine = await Machine.boot(context, source, form.MEMORY, lambda slot: share(slot.uid))
            stack.push_async_callback(machine.release)
            await self._started(machine)
            failpoints.reach("reboot.booted")
            files = await machine.store(staged)
            failpoints.reach("reboot.stored")
            await machine.end()
            own = machine.spec.files
            await asyncio.to_thread(take, own.directory / form.MEMORY, made / form.MEMORY)
            files[form.DISK] = await asyncio.to_thread(paused.take_disk, staged, own.overlay)
            private = await asyncio.to_thread(merging.describe, made, image, hardware, image_id)
            await asyncio.to_thread(context.store.publish, made, private)
            failpoints.reach("reboot.published")
            files |= await asyncio.to_thread(paused.no_pages, staged, hardware.memory_mb)
            new = msgspec.structs.replace(
                manifest,
                generation=generation,
                created_at=context.clock(),
                image_id=image_id,
                machine=hardware,
                token=machine.record.token,
                files=files,
                layers=source.layers,
                stopped="",
                rebooted=reason,
            )
            await asyncio.to_thread(compatibility.require_disks, context, new, private, staged)
            await completed(asyncio.to_thread(paused.commit, paths, new))
            self._stored = new

    async def _started(self, machine: Machine) -> None:
        try:
            await machine.initialize_guest(self.sandbox_id)
        except HostFailure as error:
            raise HostFailure(_NO_START, detail=f"{error.message}\n{error.detail}") from error

    async def _launch(
        self,
        source: LaunchSource,
        policy: NetworkPolicy,
        envs: dict[str, str] | None,
        share: Callable[[Slot], None] | None = None,
    ) -> Placement:
        async with AsyncExitStack() as undo:
            machine = await Machine.restore(self._context, source, share)
            undo.push_async_callback(machine.release)
            await self._take(machine, policy, envs)
            undo.pop_all()
        return machine.placement

    async def _take(
        self, machine: Machine, policy: NetworkPolicy, envs: dict[str, str] | None
    ) -> None:
        """Make a machine that runs this sandbox's own."""
        await machine.open_network(policy)
        await machine.initialize_guest(self.sandbox_id, envs)
        failpoints.reach("machine.greeted")
        machine.note(
            phase=Phase.RUNNING,
            sandbox_id=self.sandbox_id,
            operation_id=self.operation_id,
            started_at=self._context.clock(),
        )
        failpoints.reach("machine.running")
        self.own(machine)

    async def set_network(self, policy: NetworkPolicy) -> None:
        """Let the running guest reach what the policy says."""
        async with self._exclusive():
            await self.machine.set_network(policy)

    async def pause(self) -> None:
        """Store the machine and free all it has; on failure it runs on."""
        async with self._exclusive():
            machine, paths = self.machine, self._context.paths
            record = machine.record
            generation = record.generation + 1
            async with AsyncExitStack() as undo:
                undo.push_async_callback(
                    asyncio.to_thread, paused.unstage, paths, self.sandbox_id, generation
                )
                staged = await asyncio.to_thread(paused.stage, paths, self.sandbox_id, generation)
                failpoints.reach("pause.staged")
                image = await asyncio.to_thread(self._context.store.open, record.image_id)
                files = await machine.store(staged)
                undo.push_async_callback(machine.run_on)
                failpoints.reach("pause.stored")
                with stage("store"):
                    files[form.DISK] = await asyncio.to_thread(
                        paused.take_disk, staged, machine.spec.files.overlay
                    )
                    failpoints.reach("pause.disk")
                    manifest = self._manifest(record, image, files)
                    await asyncio.to_thread(
                        compatibility.require_disks, self._context, manifest, image, staged
                    )
                    await completed(asyncio.to_thread(paused.commit, paths, manifest))
                undo.pop_all()
            failpoints.reach("pause.committed")
            self._machine, self._stored = None, manifest
            with stage("release"):
                await completed(machine.release())
            failpoints.reach("pause.released")

    def _manifest(
        self, record: Record, image: Manifest, files: dict[str, FileDigest], stopped: str = ""
    ) -> PausedSandbox:
        return PausedSandbox(
            sandbox_id=self.sandbox_id,
            generation=record.generation + 1,
            created_at=self._context.clock(),
            image_id=record.image_id,
            machine=_hardware(record, image),
            token=record.token,
            disk_mb=image.disk_mb,
            files=files,
            layers=record.layers,
            stopped=stopped,
        )

    async def snapshot(self, image_id: ImageId) -> Manifest:
        """Make an image of the machine, which is gone afterwards; on failure it runs on."""
        async with self._exclusive():
            machine = self.machine
            record = machine.record
            base = await asyncio.to_thread(self._context.store.open, record.image_id)
            async with AsyncExitStack() as undo:
                made = undo.enter_context(self._context.store.staging())
                async with AsyncExitStack() as stopped:
                    files = await machine.store(made)
                    stopped.push_async_callback(machine.run_on)
                    failpoints.reach("snapshot.stored")
                    disks = paused.disks(self._context.paths, self.sandbox_id, record.layers)
                    source = snapshots.Source(
                        directory=made,
                        files=files,
                        disks=(*disks, machine.spec.files.overlay),
                        base=base,
                        hardware=_hardware(record, base),
                        token=record.token,
                    )
                    with stage("store"):
                        image = await completed(
                            asyncio.to_thread(snapshots.publish, self._context, source, image_id)
                        )
                    stopped.pop_all()
            failpoints.reach("snapshot.published")
            self._machine = None
            with stage("release"):
                await completed(machine.release())
            failpoints.reach("snapshot.released")
            return image

    async def checkpoint(self, image_id: ImageId) -> Manifest:
        """Make an image of the sandbox, which then goes on as it was, running or stored.

        A guest stands still only while its state is captured.
        """
        async with self._exclusive():
            with self._context.store.staging() as made:
                if self._machine is not None:
                    source = await self._captured(self._machine, made)
                else:
                    source = await completed(asyncio.to_thread(self._linked, made))
                publish = partial(snapshots.publish, self._context, source, image_id)
                with stage("store"):
                    image = await completed(asyncio.to_thread(publish))
            failpoints.reach("checkpoint.published")
            return image

    async def _captured(self, machine: Machine, made: Path) -> snapshots.Source:
        """What an image of a machine is made of, which runs on."""
        context, record = self._context, machine.record
        base = await asyncio.to_thread(context.store.open, record.image_id)
        await asyncio.to_thread(self._require_another_layer, machine, base.disk_mb)
        with stage("standstill"):
            async with machine.standing_still(made) as files:
                failpoints.reach("checkpoint.stored")
                if context.driver.disk_format.layered:
                    await completed(self._add_layer(machine, base.disk_size))
                else:
                    await self._copy_disk(machine, base, made)
        failpoints.reach("checkpoint.running")
        layers = machine.record.layers
        if context.driver.disk_format.layered:
            await asyncio.to_thread(
                paused.seclude_layer, context.paths, self.sandbox_id, layers[-1]
            )
        return snapshots.Source(
            directory=made,
            files=files,
            disks=paused.disks(context.paths, self.sandbox_id, layers),
            base=base,
            hardware=_hardware(record, base),
            token=record.token,
        )

    async def _copy_disk(self, machine: Machine, base: Manifest, made: Path) -> None:
        """Give an image the disk of a stopped machine, unless that is given up meanwhile."""
        given_up = threading.Event()

        def check() -> None:
            if given_up.is_set():
                raise Conflict("The sandbox was deleted, or the host is stopping")

        own = (machine.spec.files.overlay,)
        await in_thread(
            partial(snapshots.merge_disks, self._context, own, base, made, check), given_up
        )

    def _require_another_layer(self, machine: Machine, disk_mb: int) -> None:
        """Raise unless what a machine has written may become a layer below another one; blocks."""
        if not self._context.driver.disk_format.layered:
            return
        if machine.record.added_layers >= _MOST_ADDED_LAYERS:
            raise InvalidState(_MANY_LAYERS)
        older = paused.disks(self._context.paths, self.sandbox_id, self.layers)
        layers = Layers.of(disk_mb, older, (machine.spec.files.overlay,))
        compatibility.require_bounded(self._context, layers)
        held = held_open(machine.process.pid, self._context.paths.paused)
        layers = replace(layers, older=layers.older + held)
        if not layers.may_start(self._context.settings.disk_factor):
            raise InvalidState(_MUCH_HELD)

    async def _add_layer(self, machine: Machine, size: int) -> None:
        """Make the disk layer of a stopped machine that of a generation, and give it another."""
        paths, generation = self._context.paths, machine.record.generation + 1
        overlay = machine.spec.files.overlay
        disk = await asyncio.to_thread(
            paused.add_layer, paths, self.sandbox_id, generation, overlay
        )
        failpoints.reach("layer.linked")
        try:
            await machine.add_layer(generation, disk, size)
        except BaseException:
            if not machine.spec.files.above(generation).overlay.exists():
                await asyncio.to_thread(paused.drop, paths, self.sandbox_id, (generation,))
            raise

    def _linked(self, made: Path) -> snapshots.Source:
        """What an image of a stored sandbox is made of; blocks."""
        if self._damage is not None:
            raise self._damage
        context, manifest = self._context, self._stored
        if manifest is None:
            raise NotFound("The sandbox is not stored")
        if manifest.stopped:
            raise InvalidState(f"{_STOPPED} {_WAY_OUT}")
        paths = context.paths
        base = context.store.open_sound(manifest.image_id)
        paused.check(paths, manifest)
        compatibility.require_disks(context, manifest, base)
        for name in manifest.files.keys() - {form.DISK}:
            os.link(paths.generation(self.sandbox_id, manifest.generation) / name, made / name)
        layers = (*manifest.layers, manifest.generation)
        return snapshots.Source(
            directory=made,
            files={path.name: paused.described(manifest, path) for path in made.iterdir()},
            disks=paused.disks(paths, self.sandbox_id, layers),
            base=base,
            hardware=manifest.machine,
            token=manifest.token,
        )

    async def roll_back(
        self,
        operation_id: OperationId,
        image: Manifest,
        policy: NetworkPolicy,
        envs: dict[str, str] | None,
    ) -> Placement:
        """Continue an image's snapshot instead of what runs or is stored, which is gone then.

        On failure the sandbox is as it was.
        """
        async with self._exclusive():
            machine, stored, paths = self._machine, self._stored, self._context.paths
            if self.phase is Phase.STARTING:
                raise NotFound("The sandbox is not running")
            engine = compatibility.require_image(self._context, image)
            newest = await asyncio.to_thread(paused.newest_number, paths, self.sandbox_id)
            if machine is not None:
                newest = max(newest, machine.record.generation)
            source = replace(source_of(self._context, image, engine), generation=newest + 1)
            before, self.operation_id = self.operation_id, operation_id
            try:
                placement = await self._launch(source, policy, envs)
            except BaseException:
                self.operation_id = before
                raise
            self._stored = self._damage = None
            with stage("release"):
                await completed(self._forsake(machine, stored))
            return placement

    async def _forsake(self, machine: Machine | None, stored: PausedSandbox | None) -> None:
        """Free what the sandbox was before another machine became its own."""
        paths = self._context.paths
        failpoints.reach("rollback.switched")
        if machine is not None:
            machine.on_exit = None
            await machine.release()
        failpoints.reach("rollback.ended")
        if stored is not None:
            await asyncio.to_thread(paused.consume, paths, stored)
        await asyncio.to_thread(paused.keep, paths, self.sandbox_id, ())
        failpoints.reach("rollback.done")

    async def refer_to(self, image_id: ImageId, *, instead_of: PausedSandbox) -> bool:
        """Take an image that holds all stored pages as the base, unless they are others by now."""
        async with self._lock:
            if self._gone or self._stored is not instead_of:
                return False
            self._stored = await completed(
                asyncio.to_thread(paused.refer, self._context.paths, instead_of, image_id)
            )
            return True

    async def replace_layers(self, chain: tuple[int, ...], disk: Path) -> bool:
        """Put one disk in the place of the oldest layers, unless they are others by now."""
        async with self._lock:
            if self._gone or not chain or self.layers[: len(chain)] != chain:
                return False
            await completed(self._replace_layers(chain, disk))
            return True

    async def _replace_layers(self, chain: tuple[int, ...], disk: Path) -> None:
        paths = self._context.paths
        kept = self.layers[len(chain) - 1 :]
        await asyncio.to_thread(paused.replace_disk, paths, self.sandbox_id, chain[-1], disk)
        failpoints.reach("collapse.replaced")
        if self._stored is not None:
            self._stored = await asyncio.to_thread(paused.note_layers, paths, self._stored, kept)
        else:
            self.machine.note(layers=kept)
        failpoints.reach("collapse.noted")
        await asyncio.to_thread(paused.drop, paths, self.sandbox_id, chain[:-1])
        failpoints.reach("collapse.done")

    async def destroy(self) -> None:
        """End the sandbox and free all it has, whatever it is doing; safe to repeat."""
        self._gone = True
        if self._operation is not None:
            self._operation.cancel()
        async with self._lock:
            machine, self._machine = self._machine, None
            if machine is not None:
                await machine.release()
            failpoints.reach("destroy.released")
            self._stored = self._damage = None
            await asyncio.to_thread(paused.keep, self._context.paths, self.sandbox_id, ())
            failpoints.reach("destroy.done")

    async def bury(self) -> bool:
        """Free what a machine that ended by itself has left; False where it is stored by now.

        If it was its guest that stopped, the sandbox is stored afterwards: its disk alone. Raises
        `WrennError` and OSError where that fails; all is there still, to be tried again.
        """
        async with self._lock:
            machine = self._machine
            if machine is None or machine.ended is None:
                return False
            if await self._context.driver.stopped(machine.process):
                self._stored = await self._keep_disk(machine, machine.ended)
                self._machine = None
                await machine.release()
                return True
            self._gone = True
            self._machine = None
            await machine.release()
            await asyncio.to_thread(paused.keep, self._context.paths, self.sandbox_id, ())
        return True

    async def _keep_disk(self, machine: Machine, reason: str) -> PausedSandbox:
        paths, record = self._context.paths, machine.record
        generation = record.generation + 1
        image = await asyncio.to_thread(self._context.store.open, record.image_id)
        try:
            staged = await asyncio.to_thread(paused.stage, paths, self.sandbox_id, generation)
            disk = await asyncio.to_thread(paused.take_disk, staged, machine.spec.files.overlay)
            manifest = self._manifest(record, image, {form.DISK: disk}, reason)
            await asyncio.to_thread(
                compatibility.require_disks, self._context, manifest, image, staged
            )
            await completed(asyncio.to_thread(paused.commit, paths, manifest))
        except BaseException:
            await asyncio.to_thread(paused.unstage, paths, self.sandbox_id, generation)
            raise
        failpoints.reach("stop.committed")
        return manifest

    async def detach(self) -> None:
        """Let go of a sandbox that runs on without this server."""
        if self._operation is not None:
            self._operation.cancel()
        async with self._lock:
            if self._machine is not None:
                await self._machine.detach()

    def _exited(self, reason: str) -> None:
        if not self._gone:
            self._on_exit(self, reason)

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        async with self._lock:
            if self._gone:
                raise Conflict("The sandbox is gone")
            self._operation = asyncio.current_task()
            try:
                with _translated():
                    yield
            finally:
                self._operation = None


def _hardware(record: Record, image: Manifest) -> HardwareProfile:
    """What a machine stores: it runs as the image that it continues, on the engine that it has."""
    machine = compatibility.started_as(image)
    return msgspec.structs.replace(machine, engine=record.engine or machine.engine)


@contextmanager
def _translated() -> Iterator[None]:
    """Failures of files and disks as `NoCapacity` and `HostFailure`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoCapacity(_NO_SPACE, detail=str(error)) from error
        raise HostFailure("The host could not complete the operation", detail=str(error)) from error


@contextmanager
def _way_out() -> Iterator[None]:
    """Name in a failure what else can be done; the disk is sound."""
    try:
        yield
    except AgentError as error:
        raise type(error)(f"{error.message}. {_WAY_OUT}", detail=error.detail) from error
