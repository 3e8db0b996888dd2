"""A host in memory that fails on command: for faults which a real host does not show at will."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from support.guest_double import GuestDouble, GuestState
from wrenn_sandbox.errors import Conflict, HostFailure, NotFound
from wrenn_sandbox.ids import ImageId, OperationId, SandboxId
from wrenn_sandbox.model.secrets import Injection
from wrenn_sandbox.model.template import Size
from wrenn_sandbox.wire.messages import (
    BaseTemplate,
    Command,
    CommandResult,
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
from wrenn_sandbox.wire.metrics import HostMetrics, PoolMetrics, SlotMetrics, StoredBytes

BORN = datetime(2026, 1, 1, tzinfo=UTC)
PLACEMENT = Placement(guest_ip="169.254.0.21", host_ip="10.231.0.2")
BASE_IMAGE = ImageId("img-minimal")
ANSWER = CommandResult(exit_code=0, stdout=b"hello\n", stderr=b"", duration_ms=1)


@dataclass
class Gate:
    """Holds calls back until it is opened; `arrived` says that one is waiting."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def pass_through(self) -> None:
        self.arrived.set()
        await self.opened.wait()


class HostDouble(GuestState):
    """Implements `Host`. `fail[call]` makes a call raise, `gates[call]` makes it wait first."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[SandboxId, Phase] = {}
        self.networks: dict[SandboxId, Egress | None] = {}
        self.injections: dict[SandboxId, Injection | None] = {}
        self.envs: dict[SandboxId, dict[str, str] | None] = {}
        self.busy: set[SandboxId] = set()
        self.measured: defaultdict[SandboxId, list[Sample]] = defaultdict(list)
        self.logs: defaultdict[SandboxId, list[LogLine]] = defaultdict(list)
        self.images: dict[ImageId, ImageInfo] = {}
        self.template_size = Size(1, 512)
        self.image_bytes = 8192
        self.disk_bytes: dict[str, int] = {}
        self.gates: dict[str, Gate] = {}
        self.calls: list[tuple[str, str]] = []
        self.called: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.commands: list[Command] = []
        self.answer: Callable[[Command], CommandResult] = lambda _: ANSWER
        self._snapshots: dict[OperationId, ImageInfo] = {}
        self._events: list[HostEvent] = []
        self._asked_after = 0
        self.epoch = "first"
        self.owner: str | None = None
        self._news = asyncio.Condition()

    def hold(self, call: str) -> Gate:
        """Make the next calls of this name wait."""
        self.gates[call] = Gate()
        return self.gates[call]

    async def exit(
        self,
        sandbox_id: SandboxId,
        reason: str,
        *,
        kept: bool = False,
        at: datetime | None = None,
    ) -> None:
        """Let a machine end by itself; returns when the control plane has taken note.

        With its disk `kept` it is the guest that stopped.
        """
        if kept:
            self.phases[sandbox_id] = Phase.PAUSED
        else:
            del self.phases[sandbox_id]
        async with self._news:
            number = len(self._events) + 1
            self._events.append(
                HostEvent(
                    number=number,
                    sandbox_id=sandbox_id,
                    kind=EventKind.STOPPED if kept else EventKind.EXITED,
                    reason=reason,
                    at=at or datetime.now(UTC),
                )
            )
            self._news.notify_all()
            await self._news.wait_for(lambda: self._asked_after >= number)

    async def _enter(self, call: str, subject: str) -> None:
        self.calls.append((call, subject))
        self.called[call].set()
        await asyncio.sleep(0)
        gate = self.gates.get(call)
        if gate is not None:
            await gate.pass_through()
        if call in self.fail:
            raise self.fail[call]

    async def enter_guest(self, call: str, sandbox_id: SandboxId) -> None:
        self._require(sandbox_id, Phase.RUNNING)
        await self._enter(call, sandbox_id)
        self._require(sandbox_id, Phase.RUNNING)

    async def claim(self, owner: str, *, expected: bool) -> None:
        if self.owner not in (None, owner) and self.phases:
            raise Conflict("These sandboxes belong to another database")
        self.owner = owner

    async def info(self) -> HostInfo:
        return HostInfo(
            driver="double",
            accelerator="none",
            network="none",
            vmm_version="1",
            sandboxes=len(self.phases),
            memory_total_mb=1024,
            memory_free_mb=1024,
            disk_free_mb=1024,
        )

    async def metrics(self) -> HostMetrics:
        await self._enter("host_metrics", "")
        return HostMetrics(
            vms={each.value: list(self.phases.values()).count(each) for each in Phase},
            vms_limit=10,
            memory_total=1 << 30,
            memory_free=1 << 30,
            memory_reserve=0,
            memory_promised=0,
            memory_limit=None,
            disk_total=1 << 30,
            disk_free=1 << 30,
            disk_reserve=0,
            slots=SlotMetrics(),
            pool=PoolMetrics(),
            stored=StoredBytes(),
            refusals={},
        )

    async def templates(self) -> list[BaseTemplate]:
        return [
            BaseTemplate(
                name="minimal",
                image_id=BASE_IMAGE,
                vcpus=self.template_size.vcpus,
                memory_mb=self.template_size.memory_mb,
                size_bytes=4096,
                created_at=BORN,
            )
        ]

    async def template_image(self, name: str) -> TemplateImage:
        for each in await self.templates():
            if each.name == name:
                return TemplateImage(
                    image_id=each.image_id, vcpus=each.vcpus, memory_mb=each.memory_mb
                )
        raise NotFound("There is no such template")

    async def create(self, request: CreateSandbox) -> Placement:
        self.phases[request.sandbox_id] = Phase.STARTING
        try:
            await self._enter("create", request.sandbox_id)
            if request.image_id != BASE_IMAGE and request.image_id not in self.images:
                raise NotFound("There is no such image")
            if request.sandbox_id not in self.phases:
                raise HostFailure("The machine was ended while it was starting")
        except BaseException:
            self.phases.pop(request.sandbox_id, None)
            raise
        self.phases[request.sandbox_id] = Phase.RUNNING
        self.networks[request.sandbox_id] = request.network
        self.injections[request.sandbox_id] = request.injection
        self.envs[request.sandbox_id] = request.envs
        return PLACEMENT

    async def destroy(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        await self._enter("destroy", sandbox_id)
        self.phases.pop(sandbox_id, None)

    def _require(self, sandbox_id: SandboxId, phase: Phase) -> None:
        if self.phases.get(sandbox_id) is not phase:
            raise NotFound(f"It is not {phase} here")

    async def pause(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        self._require(sandbox_id, Phase.RUNNING)
        await self._enter("pause", sandbox_id)
        self._require(sandbox_id, Phase.RUNNING)
        self.phases[sandbox_id] = Phase.PAUSED

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
        self._require(sandbox_id, Phase.PAUSED)
        await self._enter("resume" if memory else "reboot", sandbox_id)
        self._require(sandbox_id, Phase.PAUSED)
        self.phases[sandbox_id] = Phase.RUNNING
        self.networks[sandbox_id] = network
        self.injections[sandbox_id] = injection
        self.envs[sandbox_id] = envs
        return PLACEMENT

    async def set_network(
        self,
        sandbox_id: SandboxId,
        operation_id: OperationId,
        network: Egress,
        *,
        injection: Injection | None = None,
    ) -> None:
        self._require(sandbox_id, Phase.RUNNING)
        await self._enter("set_network", sandbox_id)
        self._require(sandbox_id, Phase.RUNNING)
        self.networks[sandbox_id] = network
        self.injections[sandbox_id] = injection

    async def snapshot(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        if operation_id in self._snapshots:
            return self._snapshots[operation_id]
        self._require(sandbox_id, Phase.RUNNING)
        await self._enter("snapshot", sandbox_id)
        self._require(sandbox_id, Phase.RUNNING)
        del self.phases[sandbox_id]
        image = ImageInfo(
            image_id=image_id, vcpus=2, memory_mb=256, size=self.image_bytes, created_at=BORN
        )
        self.images[image_id] = self._snapshots[operation_id] = image
        return image

    async def checkpoint(
        self, sandbox_id: SandboxId, operation_id: OperationId, image_id: ImageId
    ) -> ImageInfo:
        if image_id in self.images:
            return self.images[image_id]
        phase = self.phases.get(sandbox_id)
        if phase not in (Phase.RUNNING, Phase.PAUSED):
            raise NotFound("It is not here")
        await self._enter("checkpoint", sandbox_id)
        self._require(sandbox_id, phase)
        self.images[image_id] = ImageInfo(
            image_id=image_id, vcpus=2, memory_mb=256, size=self.image_bytes, created_at=BORN
        )
        return self.images[image_id]

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
        phase = self.phases.get(sandbox_id)
        if phase not in (Phase.RUNNING, Phase.PAUSED):
            raise NotFound("It is not here")
        if image_id != BASE_IMAGE and image_id not in self.images:
            raise NotFound("There is no such image")
        await self._enter("rollback", sandbox_id)
        self._require(sandbox_id, phase)
        self.phases[sandbox_id] = Phase.RUNNING
        self.networks[sandbox_id] = network
        self.injections[sandbox_id] = injection
        self.envs[sandbox_id] = envs
        return PLACEMENT

    async def remove_image(self, image_id: ImageId) -> None:
        await self._enter("remove_image", image_id)
        self.images.pop(image_id, None)

    async def held_images(self) -> list[ImageInfo]:
        return list(self.images.values())

    async def sandboxes(self) -> list[SandboxReport]:
        await self._enter("sandboxes", "")
        return [
            SandboxReport(
                sandbox_id=sandbox_id,
                phase=phase,
                busy=sandbox_id in self.busy,
                placement=PLACEMENT if phase is Phase.RUNNING else None,
                disk_bytes=self.disk_bytes.get(sandbox_id),
                network=self.networks.get(sandbox_id) if phase is Phase.RUNNING else None,
                injection=self._version(sandbox_id) if phase is Phase.RUNNING else None,
            )
            for sandbox_id, phase in self.phases.items()
        ]

    def _version(self, sandbox_id: SandboxId) -> str | None:
        injection = self.injections.get(sandbox_id)
        return None if injection is None else injection.version

    async def samples(self, sandbox_id: SandboxId, start: int, end: int) -> Samples:
        await self._enter("samples", sandbox_id)
        found = [each for each in self.measured[sandbox_id] if start <= each.time <= end]
        return Samples(step_sec=5, samples=tuple(found))

    async def last_sample(self, sandbox_id: SandboxId) -> Sample | None:
        return self.measured[sandbox_id][-1] if self.measured[sandbox_id] else None

    async def log(
        self, sandbox_id: SandboxId, cursor: int | None, *, backward: bool, limit: int
    ) -> list[LogLine]:
        await self._enter("log", sandbox_id)
        lines = self.logs[sandbox_id]
        if backward:
            found = [each for each in lines[::-1] if cursor is None or each.number < cursor]
        else:
            found = [each for each in lines if each.number > (cursor or 0)]
        return found[:limit]

    async def events(self, epoch: str, after: int) -> HostEvents:
        async with self._news:
            seen = after if epoch == self.epoch else 0
            self._asked_after = seen
            self._news.notify_all()
            now = self.epoch
            await self._news.wait_for(lambda: len(self._events) > seen or self.epoch != now)
            if self.epoch != now:
                raise HostFailure("The host ended.")
            return HostEvents(epoch=self.epoch, events=tuple(self._events[seen:]))

    async def restart(self) -> None:
        """Begin a new epoch: whoever waits fails, and numbers begin with 1 again."""
        async with self._news:
            self.epoch, self._asked_after = f"{self.epoch}+", 0
            self._events = []
            self._news.notify_all()

    def guest(self, sandbox_id: SandboxId) -> GuestDouble:
        return GuestDouble(self, sandbox_id)

    async def run(self, command: Command) -> CommandResult:
        self.commands.append(command)
        return self.answer(command)
