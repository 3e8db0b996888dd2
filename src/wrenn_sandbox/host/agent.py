"""The host agent: the in-process implementation of the Host interface for this machine."""

import asyncio
import itertools
import shutil
from collections import deque
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Final, Self

import structlog

from wrenn_sandbox.errors import AgentError, Conflict, NoCapacity, NotFound
from wrenn_sandbox.host import capacity, journal
from wrenn_sandbox.host.equipment import Equipment
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.lock import DirectoryLock
from wrenn_sandbox.host.machine import Machine, Parts
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.process import kill_now
from wrenn_sandbox.ids import ImageId, OperationId, SandboxId, new_random
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import (
    BaseTemplate,
    Command,
    CommandResult,
    CreateSandbox,
    EventKind,
    GuestMetrics,
    HostEvent,
    HostInfo,
    ImageInfo,
    Phase,
    Placement,
    SandboxReport,
)

_log = structlog.get_logger(__name__)

EVENTS_KEPT: Final = 1000


class HostAgent:
    """Owns the machines, network slots and images of one data directory."""

    def __init__(self, settings: Settings, paths: Paths, equipment: Equipment) -> None:
        self._settings = settings
        self._paths = paths
        self._store = ImageStore(paths)
        self._driver = equipment.driver
        self._slots = equipment.slots
        self._network = equipment.network
        self._parts = Parts(
            settings=settings,
            paths=paths,
            store=self._store,
            driver=equipment.driver,
            slots=equipment.slots,
            connect=partial(connect_guest, equipment.namespaces),
            clock=lambda: datetime.now(UTC),
            random=new_random,
            on_exit=self._exited,
        )
        self._machines: dict[SandboxId, Machine] = {}
        self._starting: dict[SandboxId, asyncio.Task[Placement]] = {}
        self._events: deque[HostEvent] = deque(maxlen=EVENTS_KEPT)
        self._numbers = itertools.count(1)
        self._event_added = asyncio.Event()
        self._boot_id = journal.boot_id()
        self._undo = AsyncExitStack()
        self._closing = False

    @classmethod
    async def start(cls, settings: Settings) -> Self:
        """Take the data directory, adopt the machines that still run and reclaim the rest.

        Raises `Conflict` where another server uses the data directory and `HostFailure` where
        this machine can not run sandboxes.
        """
        paths = Paths(settings.data_dir)
        async with AsyncExitStack() as undo:
            await asyncio.to_thread(paths.prepare)
            lock = DirectoryLock(paths.server_lock)
            if not lock.acquire():
                raise Conflict("Another server is using this data directory.")
            undo.callback(lock.release)
            equipment = await Equipment.of(settings, paths)
            undo.push_async_callback(equipment.close)
            agent = cls(settings, paths, equipment)
            await asyncio.to_thread(equipment.driver.prepare, agent._store)
            await agent._take_over()
            agent._undo = undo.pop_all()
        return agent

    async def close(self) -> None:
        """Let go of everything; machines run on and are adopted by the next start."""
        self._closing = True
        starting = list(self._starting.values())
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        kept = set()
        for machine in list(self._machines.values()):
            await machine.detach()
            if machine.record.slot is not None:
                kept.add(machine.record.slot.index)
        self._event_added.set()
        await self._slots.close(keep=kept)
        await self._undo.aclose()

    async def info(self) -> HostInfo:
        free = await asyncio.to_thread(capacity.measure, self._paths.data_dir)
        capabilities = self._driver.capabilities
        return HostInfo(
            driver=capabilities.name,
            accelerator=capabilities.accelerator,
            network=self._network,
            vmm_version=capabilities.version,
            sandboxes=len(self._machines),
            memory_total_mb=free.memory_total_mb,
            memory_free_mb=free.memory_free_mb,
            disk_free_mb=free.disk_free_mb,
        )

    async def templates(self) -> list[BaseTemplate]:
        found = await asyncio.to_thread(self._store.templates)
        return [
            BaseTemplate(
                name=template.name,
                image_id=template.manifest.image_id,
                vcpus=template.manifest.vcpus,
                memory_mb=template.manifest.memory_mb,
                size=template.size,
                created_at=template.manifest.created_at,
            )
            for template in found
        ]

    async def create(self, request: CreateSandbox) -> Placement:
        known = self._machines.get(request.sandbox_id)
        if known is not None and known.record.operation_id != request.operation_id:
            raise Conflict("The sandbox exists.")
        task = self._starting.get(request.sandbox_id)
        if task is None:
            if known is not None:
                return known.placement
            await self._admit(request.memory_mb)
            record = Record(
                sandbox_id=request.sandbox_id,
                operation_id=request.operation_id,
                image_id=request.image_id,
                vcpus=request.vcpus,
                memory_mb=request.memory_mb,
                phase=Phase.STARTING,
                driver=self._driver.capabilities.name,
                boot_id=self._boot_id,
            )
            machine = Machine(self._parts, record)
            self._machines[request.sandbox_id] = machine
            task = self._begin(machine, machine.start())
        return await asyncio.shield(task)

    async def destroy(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        machine = self._machines.get(sandbox_id)
        if machine is not None:
            await machine.destroy()
            self._machines.pop(sandbox_id, None)

    async def remove_image(self, image_id: ImageId) -> None:
        raise NotFound("There is no such image.")

    async def pause(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        raise AgentError("This host can not pause sandboxes.")

    async def resume(self, sandbox_id: SandboxId, operation_id: OperationId) -> Placement:
        raise AgentError("This host can not resume sandboxes.")

    async def snapshot(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        raise AgentError("This host can not make snapshots.")

    async def sandboxes(self) -> list[SandboxReport]:
        return [
            SandboxReport(
                sandbox_id=sandbox_id,
                phase=machine.record.phase,
                busy=machine.busy,
                placement=machine.placement if machine.record.slot is not None else None,
            )
            for sandbox_id, machine in self._machines.items()
        ]

    async def events(self, after: int) -> list[HostEvent]:
        while not self._closing:
            found = [event for event in self._events if event.number > after]
            if found:
                return found
            self._event_added.clear()
            await self._event_added.wait()
        return []

    async def exec(
        self, sandbox_id: SandboxId, command: Command, *, timeout: float, output_limit: int
    ) -> CommandResult:
        client = self._machine(sandbox_id).client
        return await client.exec(command, timeout=timeout, output_limit=output_limit)

    async def metrics(self, sandbox_id: SandboxId) -> GuestMetrics:
        return await self._machine(sandbox_id).client.metrics()

    def _machine(self, sandbox_id: SandboxId) -> Machine:
        machine = self._machines.get(sandbox_id)
        if machine is None:
            raise NotFound("The sandbox is not running.")
        return machine

    async def _admit(self, memory_mb: int) -> None:
        """Raise `NoCapacity` unless there is room for one more machine."""
        if self._closing:
            raise NoCapacity("The host is shutting down.")
        if len(self._machines) >= self._settings.max_running:
            raise NoCapacity("The host runs as many sandboxes as it may; delete or pause one.")
        free = await asyncio.to_thread(capacity.measure, self._paths.data_dir)
        promised = sum(
            machine.record.memory_mb
            for machine in self._machines.values()
            if machine.record.phase is Phase.STARTING
        )
        if free.memory_free_mb - promised - memory_mb < self._settings.memory_reserve_mb:
            raise NoCapacity("The host has no memory left for this sandbox.")
        if free.disk_free_mb < self._settings.disk_reserve_mb:
            raise NoCapacity("The host has no disk space left for another sandbox.")

    def _begin(
        self, machine: Machine, work: Coroutine[None, None, Placement]
    ) -> asyncio.Task[Placement]:
        """Start a machine in a task of its own, which takes the machine away if it fails."""
        sandbox_id = machine.record.sandbox_id

        async def begin() -> Placement:
            try:
                return await work
            except BaseException:
                if self._machines.get(sandbox_id) is machine:
                    del self._machines[sandbox_id]
                raise
            finally:
                del self._starting[sandbox_id]

        task = asyncio.create_task(begin(), name=f"start {sandbox_id}")
        task.add_done_callback(_retrieve)
        self._starting[sandbox_id] = task
        return task

    def _exited(self, machine: Machine, reason: str) -> None:
        sandbox_id = machine.record.sandbox_id
        if self._machines.get(sandbox_id) is machine:
            del self._machines[sandbox_id]
        self._events.append(
            HostEvent(
                number=next(self._numbers),
                sandbox_id=sandbox_id,
                kind=EventKind.EXITED,
                reason=reason,
                at=self._parts.clock(),
            )
        )
        self._event_added.set()

    async def _take_over(self) -> None:
        """Adopt what still runs, then remove everything that nobody owns any more."""
        adopted: set[int] = set()
        for directory in await asyncio.to_thread(lambda: sorted(self._paths.run.iterdir())):
            record = journal.read(self._paths.sandbox(SandboxId(directory.name)).journal)
            machine = None if record is None else await self._adopted(record)
            if machine is not None and machine.record.slot is not None:
                self._machines[machine.record.sandbox_id] = machine
                adopted.add(machine.record.slot.index)
                continue
            for pid in await asyncio.to_thread(journal.processes_of, directory):
                await asyncio.to_thread(kill_now, pid)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            _log.info("reclaimed a machine", sandbox=directory.name)
        await self._slots.start(keep=adopted)
        for sandbox_id, machine in list(self._machines.items()):
            if not await machine.answers():
                await machine.destroy()
                del self._machines[sandbox_id]
                _log.warning("an adopted machine does not answer", sandbox=sandbox_id)

    async def _adopted(self, record: Record) -> Machine | None:
        if record.boot_id != self._boot_id or record.driver != self._driver.capabilities.name:
            return None
        machine = Machine(self._parts, record)
        if not await machine.adopt():
            return None
        _log.info("adopted a machine", sandbox=record.sandbox_id)
        return machine


def _retrieve(task: asyncio.Task[Placement]) -> None:
    """Take note of the task's error: whoever waits for it has it too."""
    if not task.cancelled():
        task.exception()
