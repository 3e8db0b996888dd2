"""Machines made in advance, so that a create finds one ready.

Each is restored from one image and its agent has answered. The pool is refilled in the background
as long as memory allows. An empty pool is no error: whoever finds nothing starts a machine.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Final

import structlog

from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.ids import ImageId
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import Command
from wrenn_sandbox.wire.metrics import PoolMetrics

from .context import HostContext
from .launch_source import source_of
from .machine import Machine
from .stages import stage

_log = structlog.get_logger(__name__)

_GIVE_WAY_SEC: Final = 1.0
_GIVE_WAY_LIMIT_SEC: Final = 5.0
"""A claim is left alone for a second before its replacement is made, many in a row for five:
whoever claimed needs the processors first (measured: 38 instead of 88 ms)."""
_LOOK_SEC: Final = 10.0
"""How often a pool that is not full looks for room."""
_RETRY_SEC: Final = 1.0
_MAX_RETRY_SEC: Final = 60.0
_NAME: Final = "pool"
_WARM_UP: Final = Command(cmd="/bin/true")
"""An emulated processor translates code anew in each machine: the way of a command, here."""
_WARM_UP_SEC: Final = 30.0


class Pool:
    """The machines in waiting of one host, all of the image that `wanted` gives."""

    def __init__(
        self,
        context: HostContext,
        *,
        size: int,
        wanted: Callable[[], Awaitable[Manifest | None]],
        room: Callable[[int], Awaitable[bool]],
    ) -> None:
        self._context = context
        self._size = size
        self._wanted = wanted
        self._room = room
        self._machines: deque[Machine] = deque()
        self._releasing: set[asyncio.Task[None]] = set()
        self._image_id: ImageId | None = None
        """What was wanted last."""
        self._hits = self._misses = 0
        self._claimed = 0.0
        """When a machine was last claimed, on the event loop's clock."""
        self._claim = asyncio.Event()
        self._wake = asyncio.Event()
        self._filled = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to fill the pool."""
        if self._size:
            self._wake.set()
            with self._context.stages.of("pool"):
                self._worker = asyncio.create_task(self._work(), name="pool")

    def take(self, image_id: ImageId) -> Machine | None:
        """A machine of this image, or None. It is the caller's from now on."""
        if not self._machines or self._machines[0].record.image_id != image_id:
            self._misses += image_id == self._image_id
            return None
        self._hits += 1
        machine = self._machines.popleft()
        machine.on_exit = None
        self._claimed = asyncio.get_running_loop().time()
        self._claim.set()
        self._filled.clear()
        self._wake.set()
        return machine

    def metrics(self) -> PoolMetrics:
        """How full it is; of creates those count that start from its image."""
        return PoolMetrics(
            wanted=self._size, ready=len(self._machines), hits=self._hits, misses=self._misses
        )

    async def filled(self) -> None:
        """Wait until the pool is as full as its sizes and memory allow."""
        await self._filled.wait()

    async def shrink(self, missing_mb: int) -> None:
        """Give all machines up, to make room; none where all of them cannot hold so much."""
        if sum(each.record.memory_mb for each in self._machines) >= missing_mb:
            await self._release_all()

    async def _release_all(self) -> None:
        while self._machines:
            self._release(self._machines.popleft())
        if self._releasing:
            await asyncio.wait(self._releasing)

    async def close(self) -> None:
        """End the pool and its machines."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        await self._release_all()

    async def _work(self) -> None:
        pause = _LOOK_SEC
        retry = _RETRY_SEC
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            if not self._wake.is_set() and len(self._machines) >= self._size:
                continue
            self._wake.clear()
            try:
                await self._fill()
                self._filled.set()
                pause, retry = _LOOK_SEC, _RETRY_SEC
            except (WrennError, OSError) as error:
                detail = getattr(error, "detail", None)
                _log.warning("the pool could not be filled", error=str(error), detail=detail)
                pause, retry = retry, min(2 * retry, _MAX_RETRY_SEC)

    async def _fill(self) -> None:
        image = await self._wanted()
        if image is None:
            return
        self._image_id = image.image_id
        await self._drop_others(image.image_id)
        before = len(self._machines)
        while len(self._machines) < self._size and await self._room(image.memory_mb):
            await self._give_way()
            await self._add(image)
        if len(self._machines) > before:
            _log.info("filled the pool", machines=len(self._machines))

    async def _give_way(self) -> None:
        """Wait until a second after the last claim, five at most."""
        loop = asyncio.get_running_loop()
        limit = loop.time() + _GIVE_WAY_LIMIT_SEC
        with suppress(TimeoutError):
            while (until := min(self._claimed + _GIVE_WAY_SEC, limit)) > loop.time():
                self._claim.clear()
                async with asyncio.timeout_at(until):
                    await self._claim.wait()

    async def _add(self, image: Manifest) -> None:
        async with AsyncExitStack() as undo:
            machine = await Machine.restore(self._context, source_of(self._context, image))
            undo.push_async_callback(machine.release)
            await machine.initialize_guest(_NAME)
            with stage("command"):
                await machine.guest.exec(_WARM_UP, timeout=patience(_WARM_UP_SEC), output_limit=0)
            undo.pop_all()
        self._keep(machine)

    def _keep(self, machine: Machine) -> None:
        def lost(_reason: str) -> None:
            if machine in self._machines:
                self._machines.remove(machine)
            self._release(machine)
            self._wake.set()

        self._machines.append(machine)
        machine.on_exit = lost
        if machine.ended is not None:
            lost(machine.ended)

    async def _drop_others(self, image_id: ImageId) -> None:
        for machine in [each for each in self._machines if each.record.image_id != image_id]:
            self._machines.remove(machine)
            self._release(machine)
        if self._releasing:
            await asyncio.wait(self._releasing)

    def _release(self, machine: Machine) -> None:
        """Begin to end a machine that is in no queue any more; nothing stops that half way."""
        machine.on_exit = None
        task = asyncio.create_task(machine.release(), name=f"release {machine.record.machine_id}")
        self._releasing.add(task)
        task.add_done_callback(self._released)

    def _released(self, task: asyncio.Task[None]) -> None:
        self._releasing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a machine of the pool could not be ended", error=str(error))
