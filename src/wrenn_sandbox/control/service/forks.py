"""Forks: new sandboxes that go on from where another one is.

One image is made of the source, which stays as it is. It has no name and is held, by a row of the
store, until the last fork was started from it or could not be.
"""

import asyncio
from dataclasses import replace
from typing import Final

import structlog

from wrenn_sandbox.control.store.records import ForkImage, Sandbox
from wrenn_sandbox.control.store.sandboxes import Change, deadline
from wrenn_sandbox.errors import InternalError, InvalidState, WrennError
from wrenn_sandbox.ids import ImageId, SandboxId, new_operation_id, new_sandbox_id
from wrenn_sandbox.model.sandbox import Event, State, Status
from wrenn_sandbox.wire.messages import Egress, ImageInfo

from .context import ControlContext
from .draining import Draining
from .images import DiscardedImages
from .lifecycle import WANTED, Lifecycle, reason_of, refusals

_log = structlog.get_logger(__name__)
_AT_ONCE: Final = 4
"""How many forks of one request are started at a time."""


class Forks:
    def __init__(
        self,
        context: ControlContext,
        lifecycle: Lifecycle,
        draining: Draining,
        images: DiscardedImages,
    ) -> None:
        self._store = context.store
        self._host = context.host
        self._operations = context.operations
        self._lifecycle = lifecycle
        self._draining = draining
        self._images = images
        self._wakeups = context.wakeups
        self._metrics = context.metrics
        self._clock = context.clock

    def make(
        self,
        source: Sandbox,
        image_id: ImageId,
        count: int,
        *,
        timeout_sec: int | None,
        deadline_sec: int | None,
        network: Egress | None,
    ) -> "asyncio.Future[list[Sandbox | WrennError]]":
        """Fork a running or paused sandbox: each fork, or why it could not be made.

        What is not given is as in the source; `deadline_sec` counts from the start of each fork.
        Raises what `Host.checkpoint` raises, `InvalidState` and `QuotaExceeded`; nothing was made
        then.
        """
        self._draining.refuse()
        held = ForkImage(image_id, source.id, self._clock())
        work = self._make(source, held, count, timeout_sec, deadline_sec, network)
        return self._operations.run(source.id, work, timing=self._metrics.operation("fork"))

    async def _make(
        self,
        source: Sandbox,
        held: ForkImage,
        count: int,
        timeout_sec: int | None,
        deadline_sec: int | None,
        network: Egress | None,
    ) -> list[Sandbox | WrennError]:
        envs = await self._store.all_sandboxes.envs(source.id)
        change = Change(Event.FORK, "user", held.created_at, f"{count} forks were asked for")
        with refusals(WANTED[Event.FORK]):
            source = await self._store.snapshots.begin_fork(source.team_id, held, change)
        try:
            image = await self._host.checkpoint(source.id, new_operation_id(), held.image_id)
        except Exception as error:
            await self._end(held, Event.FORK_FAILED, reason_of(error))
            self._wakeups.reconciler.set()
            raise
        fork = _fork_of(source, image, timeout_sec, network)
        turn = asyncio.Semaphore(_AT_ONCE)
        forks = await asyncio.gather(
            *(self._start(fork, deadline_sec, envs, source.id, turn) for _ in range(count))
        )
        made = sum(isinstance(each, Sandbox) for each in forks)
        await self._end(held, Event.FORKED, f"{made} of {count} forks were started")
        return forks

    async def _start(
        self,
        fork: Sandbox,
        deadline_sec: int | None,
        envs: dict[str, str],
        source_id: SandboxId,
        turn: asyncio.Semaphore,
    ) -> Sandbox | WrennError:
        async with turn:
            try:
                await self._require(source_id)
                now = self._clock()
                fork = replace(fork, id=new_sandbox_id(), created_at=now, last_updated=now)
                if deadline_sec is not None:
                    fork = replace(fork, deadline_at=deadline(deadline_sec, now))
                return await self._lifecycle.create(fork, envs, f"a fork of {source_id}")
            except WrennError as error:
                return error
            except Exception:
                _log.exception("fork not started", sandbox_id=source_id)
                return InternalError("Something went wrong on the server")

    async def _require(self, source_id: SandboxId) -> None:
        """Raise `InvalidState` where the source was deleted: its deletion waits for the forks."""
        source = await self._store.all_sandboxes.get(source_id)
        if source is None or source.state in (State.STOPPING, State.STOPPED):
            raise InvalidState("The sandbox was deleted meanwhile")

    async def _end(self, held: ForkImage, event: Event, reason: str) -> None:
        change = Change(event, "user", self._clock(), reason)
        await self._store.snapshots.end_fork(held, change)
        await self._images.remove()


def _fork_of(
    source: Sandbox, image: ImageInfo, timeout_sec: int | None, network: Egress | None
) -> Sandbox:
    return replace(
        source,
        state=State.PENDING,
        status=Status.PENDING,
        image_id=image.image_id,
        vcpus=image.vcpus,
        memory_mb=image.memory_mb,
        timeout_sec=source.timeout_sec if timeout_sec is None else timeout_sec,
        network=source.network if network is None else network,
        guest_ip=None,
        host_ip=None,
        reason=None,
        started_at=None,
        last_active_at=None,
        disk_bytes=0,
        deadline_told=None,
    )
