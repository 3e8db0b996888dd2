"""The host agent: the in-process implementation of the Host interface for this machine."""

import asyncio
import itertools
import shutil
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Final, Self, TypeVar, cast

import msgspec
import structlog

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.errors import (
    Conflict,
    IncompatibleImage,
    InvalidRequest,
    NoCapacity,
    NotFound,
    WrennError,
)
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.process import own_memory
from wrenn_sandbox.ids import ImageId, OperationId, SandboxId, new_image_id, new_random
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.model.secrets import Injection
from wrenn_sandbox.model.template import Size
from wrenn_sandbox.settings import HostSettings
from wrenn_sandbox.wire.messages import (
    BaseTemplate,
    CreateSandbox,
    Egress,
    EventKind,
    HostEvent,
    HostEvents,
    HostInfo,
    ImageInfo,
    LogLine,
    Phase,
    Placement,
    Sample,
    Samples,
    SandboxReport,
    TemplateImage,
)
from wrenn_sandbox.wire.metrics import HostMetrics, Path, Shortage

from . import admission, compatibility, disk_use, failpoints, paused, recovery
from .admission import Admission
from .backends import Backends
from .collection import EngineNeeds, ImageCollection
from .context import HostContext
from .guest import RunningGuest
from .history.log import SandboxLog
from .history.recorder import Recorder
from .history.samples import FINE_SEC, KEPT_SEC, MINUTE_SEC, STEP_SEC
from .housekeeping import Housekeeper
from .lock import DirectoryLock
from .paths import Paths
from .pools import Pool
from .recovery import Recovery
from .sandbox import Sandbox
from .stages import stage
from .variants import MOST_BOOTED_MB, Variants

T = TypeVar("T")

_log = structlog.get_logger(__name__)

EVENTS_KEPT: Final = 1000
_PAUSE_SHARE: Final = 0.25
"""The part of the disk's reserve that a pause leaves."""
_KEEP_AGAIN_SEC: Final = 10.0
_EPOCH_BYTES: Final = 8


class _Operation:
    """One under way. `outcome` is that of its task, or `Conflict` where that was cancelled."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.task = task
        self.outcome: asyncio.Future[object] = task.get_loop().create_future()

    def end(self) -> None:
        if self.task.cancelled():
            error: BaseException | None = Conflict(
                "The sandbox was deleted, or the host is stopping"
            )
        else:
            error = self.task.exception()
        if error is None:
            self.outcome.set_result(self.task.result())
        else:
            self.outcome.set_exception(error)
            self.outcome.exception()  # whoever asked may be gone


class HostAgent:
    """Owns the sandboxes, machines, network slots and images of one data directory."""

    def __init__(self, settings: HostSettings, paths: Paths, equipment: Backends) -> None:
        self._paths = paths
        self._store = ImageStore(paths)
        self._driver = equipment.driver
        self._context = HostContext(
            settings=settings,
            paths=paths,
            store=self._store,
            engines=equipment.engines,
            driver=equipment.driver,
            slots=equipment.slots,
            network=equipment.network,
            connect=partial(connect_guest, equipment.namespaces),
            clock=lambda: datetime.now(UTC),
            random=new_random,
        )
        self._stages = self._context.stages
        self._stored = disk_use.Stored(paths, self._store)
        self._variants = Variants(self._context)
        self._pool = Pool(
            self._context,
            size=settings.hot_pool_size,
            wanted=self._pooled_image,
            room=lambda memory_mb: self._admission.has_room(memory_mb),
        )
        self._admission = Admission(settings, self._running_mb, self._pool.shrink)
        self._collection = ImageCollection(
            self._store,
            self._needed_images,
            equipment.engines,
            self._needed_engines,
            engine=equipment.driver.capabilities.engine,
            variants=settings.max_variants,
        )
        self._housekeeper = Housekeeper(self._context, self._collection)
        self._sandboxes: dict[SandboxId, Sandbox] = {}
        self._recorder = Recorder(self._context, self._sandboxes)
        self._operations: dict[tuple[SandboxId, OperationId], _Operation] = {}
        self._events: deque[HostEvent] = deque(maxlen=EVENTS_KEPT)
        self._epoch = self._context.random(_EPOCH_BYTES).hex()
        self._numbers = itertools.count(1)
        self._event_added = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._early: list[tuple[Sandbox, str]] | None = []
        """What has ended while not all sandboxes are known yet, and so not what they need."""
        self._undo = AsyncExitStack()
        self._closing = asyncio.Event()

    @classmethod
    async def start(cls, settings: HostSettings) -> Self:
        """Take the data directory, adopt the machines that still run and reclaim the rest.

        Raises `Conflict` where another server uses the data directory and `HostFailure` where
        this machine cannot run sandboxes.
        """
        failpoints.arm(settings.fault_point)
        paths = Paths(settings.data_dir)
        async with AsyncExitStack() as undo:
            await asyncio.to_thread(paths.prepare)
            lock = DirectoryLock(paths.server_lock)
            if not lock.acquire():
                raise Conflict("Another server is using this data directory")
            undo.callback(lock.release)
            equipment = await Backends.of(settings, paths)
            undo.push_async_callback(equipment.close)
            agent = cls(settings, paths, equipment)
            take_over = Recovery(agent._context, agent._new_sandbox)
            agent._sandboxes.update(await take_over.run())
            agent._bury_early()
            await agent._collection.run()
            agent._pool.start()
            agent._housekeeper.start(agent._sandboxes.values())
            agent._recorder.start()
            agent._undo = undo.pop_all()
        return agent

    async def close(self) -> None:
        """Let go of everything; machines run on and are adopted by the next start."""
        self._closing.set()
        self._admission.close()
        await self._stored.close()
        await self._recorder.close()
        await self._housekeeper.close()
        await self._pool.close()
        await self._variants.close()
        operations = [each.task for each in self._operations.values()]
        for task in operations:
            task.cancel()
        await asyncio.gather(*operations, return_exceptions=True)
        kept = set()
        for sandbox in list(self._sandboxes.values()):  # one may end meanwhile
            if sandbox.phase is Phase.RUNNING:
                kept.add(sandbox.machine.record.slot.index)
            await sandbox.detach()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._event_added.set()
        await self._context.slots.close(keep=kept)
        await self._undo.aclose()

    async def claim(self, owner: str, *, expected: bool) -> None:
        in_use = bool(self._sandboxes)
        await asyncio.to_thread(
            partial(recovery.claim, self._paths, owner, in_use=in_use, expected=expected)
        )

    async def info(self) -> HostInfo:
        free = await asyncio.to_thread(admission.measure, self._paths.data_dir)
        capabilities = self._driver.capabilities
        return HostInfo(
            driver=capabilities.name,
            accelerator=capabilities.accelerator,
            network=self._context.network,
            vmm_version=capabilities.version,
            sandboxes=len(self._sandboxes),
            memory_total_mb=free.memory_total_mb,
            memory_free_mb=free.memory_free_mb,
            disk_free_mb=free.disk_free_mb,
        )

    async def metrics(self) -> HostMetrics:
        settings, slots = self._context.settings, self._context.slots
        free = await asyncio.to_thread(admission.measure, self._paths.data_dir)
        disk = await asyncio.to_thread(shutil.disk_usage, self._paths.data_dir)
        phases = Counter(each.phase for each in self._sandboxes.values())
        pool, bound_mb = self._pool.metrics(), self._admission.bound_mb(free.memory_total_mb)
        return HostMetrics(
            vms={**{each.value: phases[each] for each in Phase}, "pooled": pool.ready},
            vms_limit=settings.max_running,
            memory_total=free.memory_total_mb << 20,
            memory_free=free.memory_free_mb << 20,
            memory_reserve=settings.memory_reserve_mb << 20,
            memory_promised=self._admission.promised_mb << 20,
            memory_limit=None if bound_mb is None else bound_mb << 20,
            disk_total=disk.total,
            disk_free=disk.free,
            disk_reserve=settings.disk_reserve_mb << 20,
            slots=slots.metrics(),
            pool=pool,
            stored=await self._stored.now(),
            refusals={**self._admission.refusals, Shortage.NETWORK: slots.refusals},
            stages=self._stages.times(),
        )

    async def templates(self) -> list[BaseTemplate]:
        found = await asyncio.to_thread(self._store.templates)
        return [
            BaseTemplate(
                name=template.name,
                image_id=template.manifest.image_id,
                vcpus=template.manifest.vcpus,
                memory_mb=template.manifest.memory_mb,
                size_bytes=template.size,
                created_at=template.manifest.created_at,
            )
            for template in found
        ]

    async def template_image(self, name: str) -> TemplateImage:
        try:
            image = await asyncio.to_thread(self._store.resolve, name)
        except (InvalidRequest, IncompatibleImage) as error:
            raise NotFound("There is no such template") from error
        size = self._default_size(image)
        return TemplateImage(image_id=image.image_id, vcpus=size.vcpus, memory_mb=size.memory_mb)

    def _default_size(self, image: Manifest) -> Size:
        """What a sandbox of a base template gets for which nobody names a size."""
        settings = self._context.settings
        return Size(
            settings.default_vcpus or image.vcpus, settings.default_memory_mb or image.memory_mb
        )

    async def warm(self, template: str) -> Manifest:
        """The snapshot of a template for its own size, made unless it is there.

        Raises `NotFound` and `HostFailure`.
        """
        image = await asyncio.to_thread(self._store.resolve, template)
        return await self._variants.get(image, self._default_size(image))

    async def create(self, request: CreateSandbox) -> Placement:
        sandbox = self._sandboxes.get(request.sandbox_id)
        if sandbox is not None and sandbox.operation_id not in (None, request.operation_id):
            raise Conflict("The sandbox exists")
        if sandbox is None:
            with self._stages.of("create"), stage("admission"):
                await self._admission.reserve(
                    request.sandbox_id, request.operation_id, request.memory_mb
                )
            sandbox = self._sandboxes.get(request.sandbox_id)
        if sandbox is None:
            sandbox = self._new_sandbox(request.sandbox_id)
            sandbox.operation_id = request.operation_id
            self._sandboxes[request.sandbox_id] = sandbox
        with self._stages.of("create"):
            return await self._once(
                request.sandbox_id, request.operation_id, lambda: self._create(sandbox, request)
            )

    async def _create(self, sandbox: Sandbox, request: CreateSandbox) -> Placement:
        if sandbox.phase is Phase.RUNNING:
            return sandbox.machine.placement
        try:
            policy = request.network.policy(request.injection)
            size = Size(request.vcpus, request.memory_mb)
            with stage("image"):
                image, booted = await self._variants.startable(request.image_id, size)
            if not image.variant and (reason := await self._retired(image)):
                return await self._create_by_boot(sandbox, request, image, reason)
            placement = await sandbox.start(
                request.operation_id, image, policy, request.envs, self._pool
            )
            return _booted(placement) if booted else placement
        except BaseException:
            if self._sandboxes.get(request.sandbox_id) is sandbox:
                del self._sandboxes[request.sandbox_id]
            raise

    async def _retired(self, image: Manifest) -> str:
        machine = compatibility.started_as(image)
        return await asyncio.to_thread(compatibility.retired, self._context, machine)

    async def _create_by_boot(
        self, sandbox: Sandbox, request: CreateSandbox, image: Manifest, reason: str
    ) -> Placement:
        """Start a sandbox from the disk of a snapshot whose memory no engine continues."""
        try:
            await sandbox.begin_stored(image, reason)
            await self._reboot(sandbox, reason)
            policy = request.network.policy(request.injection)
            return _booted(await sandbox.resume(request.operation_id, policy, request.envs))
        except BaseException:
            await shielded(sandbox.destroy())
            raise

    async def destroy(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            await asyncio.to_thread(paused.keep, self._paths, sandbox_id, ())
            return
        for (owner, _), operation in list(self._operations.items()):
            if owner == sandbox_id:
                operation.task.cancel()
        await sandbox.destroy()
        self._sandboxes.pop(sandbox_id, None)
        await self._collection.run()

    async def pause(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        sandbox = self._sandbox(sandbox_id)
        if sandbox.phase is Phase.PAUSED:
            return
        with self._stages.of("pause"):
            await self._once(sandbox_id, operation_id, lambda: self._pause(sandbox))

    async def _pause(self, sandbox: Sandbox) -> None:
        """A pause may use the disk's reserve, save for a part: work goes before newcomers."""
        require_disk = partial(self._admission.require_disk, share=_PAUSE_SHARE)
        try:
            await require_disk(sandbox.memory_mb)
        except NoCapacity:
            pid = sandbox.machine.process.pid
            await require_disk(await asyncio.to_thread(own_memory, pid) >> 20)
        await sandbox.pause()

    async def resume(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        network: Egress,
        *,
        memory: bool = True,
        envs: dict[str, str] | None = None,
        injection: Injection | None = None,
    ) -> Placement:
        sandbox = self._sandbox(sandbox_id)
        if sandbox.phase is Phase.RUNNING:
            return sandbox.machine.placement
        policy = network.policy(injection)
        with self._stages.of("resume"):
            with stage("admission"):
                await self._admission.reserve(sandbox_id, operation_id, sandbox.memory_mb)
            return await self._once(
                sandbox_id,
                operation_id,
                lambda: self._resume(sandbox, operation_id, policy, memory, envs),
            )

    async def _resume(
        self,
        sandbox: Sandbox,
        operation_id: OperationId,
        policy: NetworkPolicy,
        memory: bool,
        envs: dict[str, str] | None,
    ) -> Placement:
        reason = ""
        if memory and (stored := sandbox.stored) is not None and not stored.stopped:
            reason = await asyncio.to_thread(compatibility.retired, self._context, stored.machine)
        if not reason and memory:
            return await sandbox.resume(operation_id, policy, envs)
        await self._reboot(sandbox, reason)
        return _booted(await sandbox.resume(operation_id, policy, envs))

    async def _reboot(self, sandbox: Sandbox, reason: str) -> None:
        await self._admission.require_disk(min(sandbox.memory_mb, MOST_BOOTED_MB))
        image_id = new_image_id(self._context.random)
        async with self._collection.sparing(image_id):
            await sandbox.reboot(image_id, reason)

    async def set_network(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        network: Egress,
        *,
        injection: Injection | None = None,
    ) -> None:
        sandbox, policy = self._sandbox(sandbox_id), network.policy(injection)
        await self._once(sandbox_id, operation_id, lambda: sandbox.set_network(policy))

    async def snapshot(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        if (sandbox_id, operation_id) not in self._operations:
            with suppress(NotFound):
                image = await self._image_info(image_id)
                await self.destroy(sandbox_id, operation_id)
                return image
        sandbox = self._sandbox(sandbox_id)
        if (sandbox_id, operation_id) not in self._operations:
            await self._require_image_room(sandbox)
        with self._stages.of("snapshot"):
            await self._once(sandbox_id, operation_id, lambda: sandbox.snapshot(image_id))
        self._sandboxes.pop(sandbox_id, None)
        await sandbox.destroy()
        return await self._image_info(image_id)

    async def checkpoint(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        if (sandbox_id, operation_id) not in self._operations:
            with suppress(NotFound):
                return await self._image_info(image_id)
        sandbox = self._sandbox(sandbox_id)
        with self._stages.of("checkpoint"):
            await self._once(sandbox_id, operation_id, lambda: self._checkpoint(sandbox, image_id))
        return await self._image_info(image_id)

    async def _checkpoint(self, sandbox: Sandbox, image_id: ImageId) -> Manifest:
        await self._require_image_room(sandbox)
        return await sandbox.checkpoint(image_id)

    async def _require_image_room(self, sandbox: Sandbox) -> None:
        """Raise `NoCapacity` unless there is disk space for an image of a sandbox."""
        disk = await disk_use.measured(self._context, [sandbox.holding])
        needed = disk.get(sandbox.sandbox_id, 0)
        if sandbox.phase is Phase.RUNNING:
            needed += await asyncio.to_thread(own_memory, sandbox.machine.process.pid)
        await self._admission.require_disk(needed >> 20)

    async def rollback(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        image_id: ImageId,
        network: Egress,
        *,
        envs: dict[str, str] | None = None,
        injection: Injection | None = None,
    ) -> Placement:
        sandbox, policy = self._sandbox(sandbox_id), network.policy(injection)
        if (sandbox_id, operation_id) not in self._operations:
            if sandbox.phase is Phase.RUNNING and sandbox.operation_id == operation_id:
                return sandbox.machine.placement
            image = await asyncio.to_thread(self._store.open, image_id)
            with self._stages.of("rollback"), stage("admission"):
                await self._admission.reserve(sandbox_id, operation_id, image.memory_mb)
        with self._stages.of("rollback"):
            return await self._once(
                sandbox_id,
                operation_id,
                lambda: self._roll_back(sandbox, operation_id, image_id, policy, envs),
            )

    async def _roll_back(
        self,
        sandbox: Sandbox,
        operation_id: OperationId,
        image_id: ImageId,
        policy: NetworkPolicy,
        envs: dict[str, str] | None,
    ) -> Placement:
        async with self._collection.sparing(image_id):
            with stage("image"):
                image = await asyncio.to_thread(self._store.open_sound, image_id)
            return await sandbox.roll_back(operation_id, image, policy, envs)

    async def _image_info(self, image_id: ImageId) -> ImageInfo:
        image = await asyncio.to_thread(self._store.open, image_id)
        return ImageInfo(
            image_id=image_id,
            vcpus=image.vcpus,
            memory_mb=image.memory_mb,
            size=await asyncio.to_thread(self._store.size, image_id),
            created_at=image.created_at,
        )

    async def remove_image(self, image_id: ImageId) -> None:
        await asyncio.to_thread(self._store.let_go, image_id)
        await self._collection.run()

    async def held_images(self) -> list[ImageInfo]:
        found = []
        for image_id in await asyncio.to_thread(self._store.held):
            with suppress(NotFound, IncompatibleImage):
                found.append(await self._image_info(image_id))
        return found

    async def sandboxes(self) -> list[SandboxReport]:
        holdings = [each.holding for each in self._sandboxes.values()]
        disk = await disk_use.measured(self._context, holdings)
        return [
            SandboxReport(
                sandbox_id=sandbox_id,
                phase=sandbox.phase,
                busy=sandbox.busy or sandbox.phase is Phase.STARTING,
                placement=sandbox.machine.placement if sandbox.phase is Phase.RUNNING else None,
                disk_bytes=disk.get(sandbox_id),
                network=sandbox.machine.network if sandbox.phase is Phase.RUNNING else None,
                injection=sandbox.machine.injection if sandbox.phase is Phase.RUNNING else None,
            )
            for sandbox_id, sandbox in self._sandboxes.items()
        ]

    async def samples(self, sandbox_id: SandboxId, start: int, end: int) -> Samples:
        now = round(self._context.clock().timestamp())
        # who asks for the last hour has taken a moment to do so
        step = STEP_SEC if start >= now - FINE_SEC - MINUTE_SEC else MINUTE_SEC
        start = max(start, now - KEPT_SEC)
        find = self._recorder.file(sandbox_id).between
        return Samples(
            step_sec=step, samples=tuple(await asyncio.to_thread(find, start, end, step))
        )

    async def last_sample(self, sandbox_id: SandboxId) -> Sample | None:
        stored = await asyncio.to_thread(self._recorder.file(sandbox_id).newest)
        return None if stored is None else stored.sample

    async def log(
        self, sandbox_id: SandboxId, cursor: int | None, *, backward: bool, limit: int
    ) -> list[LogLine]:
        sandbox = self._sandboxes.get(sandbox_id)
        log = SandboxLog(self._paths.history(sandbox_id)) if sandbox is None else sandbox.log
        if sandbox is not None and sandbox.phase is Phase.RUNNING:
            await sandbox.machine.keep_log()
        read = partial(log.read, cursor, backward=backward, limit=limit)
        return await asyncio.to_thread(read)

    async def events(self, epoch: str, after: int) -> HostEvents:
        seen = after if epoch == self._epoch else 0
        while not self._closing.is_set():
            found = tuple(each for each in self._events if each.number > seen)
            if found:
                return HostEvents(epoch=self._epoch, events=found)
            self._event_added.clear()
            await self._event_added.wait()
        return HostEvents(epoch=self._epoch)

    def guest(self, sandbox_id: SandboxId) -> RunningGuest:
        return self._sandbox(sandbox_id).machine.guest

    def _sandbox(self, sandbox_id: SandboxId) -> Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFound("The sandbox is not running")
        return sandbox

    def _once(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        work: Callable[[], Coroutine[None, None, T]],
    ) -> "asyncio.Future[T]":
        """Do an operation in a task of its own; whoever asks for it again waits for the same.

        A caller that goes away does not end it; `destroy` and `close` do.
        """
        key = (sandbox_id, operation_id)
        operation = self._operations.get(key)
        if operation is None:
            task = asyncio.create_task(work(), name=f"operation {operation_id} of {sandbox_id}")
            operation = self._operations[key] = _Operation(task)
            task.add_done_callback(partial(self._finished, key))
        return cast("asyncio.Future[T]", asyncio.shield(operation.outcome))

    def _finished(self, key: tuple[SandboxId, OperationId], task: asyncio.Task[object]) -> None:
        self._operations.pop(key).end()
        self._admission.release(*key)
        sandbox = self._sandboxes.get(key[0])
        if sandbox is not None:
            self._housekeeper.consider(sandbox)

    def _new_sandbox(self, sandbox_id: SandboxId) -> Sandbox:
        return Sandbox(self._context, sandbox_id, self._exited)

    async def _pooled_image(self) -> Manifest | None:
        """The snapshot that the pool's machines continue: the default template's, or none."""
        try:
            image = await asyncio.to_thread(
                self._store.resolve, self._context.settings.default_template
            )
        except NotFound:
            return None
        return await self._variants.get(image, self._default_size(image))

    def _running_mb(self) -> dict[SandboxId, int]:
        return {
            each.sandbox_id: each.memory_mb
            for each in self._sandboxes.values()
            if each.phase is Phase.RUNNING
        }

    def _needed_images(self) -> set[ImageId] | None:
        """The images of all sandboxes; None while there is one of which they are not known."""
        if any(sandbox.is_damaged for sandbox in self._sandboxes.values()):
            return None
        return {each for sandbox in self._sandboxes.values() for each in sandbox.image_ids}

    def _needed_engines(self) -> EngineNeeds:
        sandboxes = self._sandboxes.values()
        return EngineNeeds(
            running={each for sandbox in sandboxes for each in sandbox.engines},
            stored=[each.stored.machine for each in sandboxes if each.stored is not None],
            images={each for box in sandboxes if box.stored is None for each in box.image_ids},
        )

    def _bury_early(self) -> None:
        early, self._early = self._early or [], None
        for each in early:
            self._exited(*each)

    def _exited(self, sandbox: Sandbox, reason: str) -> None:
        if self._early is not None:
            self._early.append((sandbox, reason))
            return
        self._tasks.add(task := asyncio.create_task(self._bury(sandbox, reason)))
        task.add_done_callback(self._tasks.discard)

    async def _bury(self, sandbox: Sandbox, reason: str) -> None:
        """Free what a machine that ended by itself has left, then tell of its end."""
        while True:
            try:
                if not await sandbox.bury():
                    return
                break
            except (WrennError, OSError) as error:
                detail = error.detail if isinstance(error, WrennError) else ""
                _log.error(
                    "the disk of a guest that stopped is not kept yet",
                    sandbox=sandbox.sandbox_id,
                    error=str(error),
                    detail=detail,
                )
            with suppress(TimeoutError):
                async with asyncio.timeout(_KEEP_AGAIN_SEC):
                    await self._closing.wait()
                    return
        kept = sandbox.stored is not None
        if not kept and self._sandboxes.get(sandbox.sandbox_id) is sandbox:
            del self._sandboxes[sandbox.sandbox_id]
        self._events.append(
            HostEvent(
                number=next(self._numbers),
                sandbox_id=sandbox.sandbox_id,
                kind=EventKind.STOPPED if kept else EventKind.EXITED,
                reason=reason,
                at=self._context.clock(),
            )
        )
        self._event_added.set()
        await self._collection.run()


def _booted(placement: Placement) -> Placement:
    return msgspec.structs.replace(placement, path=Path.BOOTED)
