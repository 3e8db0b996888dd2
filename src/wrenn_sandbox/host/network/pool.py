"""The pool of network slots: made in advance, handed out, removed and made anew after use.

One background task does all making and removing, so slots never race each other. Who acquires
from an empty pool waits for that task's next batch. A released slot is removed at once; its number
rests for the cool-down before it is used again.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence, Set
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from wrenn_sandbox.errors import HostFailure, NoCapacity, WrennError
from wrenn_sandbox.host.egress.proxy import EgressProxy
from wrenn_sandbox.host.lock import DirectoryLock
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.slot import NOTHING, Denials, Slot, Traffic
from wrenn_sandbox.model.network import NetworkPolicy, closed_to_all
from wrenn_sandbox.settings import HostSettings
from wrenn_sandbox.wire.metrics import SlotMetrics

from . import builder as building
from .addressing import (
    RUNTIME_DIR,
    AddressPlan,
    blocks_of,
    claim_block,
    data_dir_tag,
    note_tag,
)
from .builder import SlotBuilder
from .resolvers import resolvers
from .rules import Ground, Limits

BATCH = 4
REMOVAL_BATCH = 8
RETRY_SEC = 1.0
MAX_RETRY_SEC = 60.0
GIVE_WAY_SEC = 1.0
GIVE_WAY_LIMIT_SEC = 5.0
"""How long the pool waits after its last slot was taken before it makes another, and at most since
the first one: who took it has a VM to start, and wants the processors."""
_CLOSED = "The network pool is closed"

_log = structlog.get_logger(__name__)


class SlotPool:
    """Slots of one data directory on this machine; needs root, `ip`, `nft` and /dev/net/tun."""

    def __init__(self, settings: HostSettings, *, runtime_dir: Path = RUNTIME_DIR) -> None:
        self._settings = settings
        self._tag = data_dir_tag(settings.data_dir)
        self._limits = Limits(
            connections=settings.guest_connections,
            connections_per_sec=settings.guest_connections_per_sec,
            mbit_per_sec=settings.guest_mbit_per_sec,
        )
        self._runtime_dir = runtime_dir
        self._builder: SlotBuilder | None = None
        self._proxy: EgressProxy | None = None
        self._undo = AsyncExitStack()
        self._worker: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closing = False
        self._capacity: int | None = None
        self.refusals = 0
        self._retry_sec = RETRY_SEC
        self._idle: deque[Slot] = deque()
        self._used: set[int] = set()
        self._policies: dict[int, NetworkPolicy] = {}
        """Of each slot the policy that its rules are known to hold."""
        self._doomed: set[int] = set()
        self._resting: dict[int, float] = {}
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._first_taken = self._last_taken = -math.inf
        """When slots were taken since the pool was full."""

    async def start(self, keep: Mapping[int, NetworkPolicy] = NOTHING) -> None:
        """Reclaim what a dead process of the same data directory left, except the slots `keep`.

        Those get the rules of this server and the policies named with them.
        The pool fills in the background. Raises `HostFailure` when another process serves this data
        directory, when the network range is used up, or when a leftover cannot be removed.
        """
        settings = self._settings
        async with AsyncExitStack() as undo:
            thread = NamespaceThread("wrenn-slots")
            undo.callback(thread.close)
            plan = await thread.run(None, lambda: self._claim(undo))
            servers = await thread.run(None, lambda: resolvers(settings.dns_servers))
            policies = NamespaceThread("wrenn-policies")
            undo.callback(policies.close)
            closed = closed_to_all(settings.network_cidr, settings.allowable_cidrs)
            ground = Ground(servers, closed, settings.allowable_cidrs, self._limits)
            builder = SlotBuilder(plan, ground, thread, policies)
            proxy = EgressProxy(
                settings.data_dir,
                plan.egress_uid,
                servers,
                closed,
                settings.allowable_cidrs,
                settings.egress_ca_file,
            )
            undo.push_async_callback(proxy.close)
            found = await thread.run(None, lambda: building.leftovers(self._tag))
            await builder.remove(found - keep.keys())
            obstacle = await thread.run(None, builder.connect_host)
            self._undo = undo.pop_all()
        self._builder, self._proxy = builder, proxy
        self._used = found & keep.keys()
        for index in self._used:
            try:
                await builder.keep(index, keep[index])
                if keep[index].by_name:
                    await proxy.admit(plan.slot(index), keep[index])
            except HostFailure as error:
                _log.error("a slot keeps its old rules", slot=index, detail=error.detail)
            else:
                self._policies[index] = keep[index]
        if obstacle:
            _log.warning("sandboxes have no internet", reason=obstacle)
        elif not servers:
            _log.warning("sandboxes have no name server", advice="set WRENN_DNS_SERVERS")
        self._capacity = plan.capacity
        self._wake.set()
        self._worker = asyncio.create_task(self._work(plan, builder), name="network-slots")

    async def acquire(self) -> Slot:
        """A slot from the pool, or a new one when it is empty.

        Raises `HostFailure` when one cannot be made and `NoCapacity` when the range is used up.
        """
        if self._worker is None or self._closing:
            raise HostFailure(_CLOSED)
        if self._idle:
            now = time.monotonic()
            if len(self._idle) >= self._settings.slot_pool_size:
                self._first_taken = now
            self._last_taken = now
            self._wake.set()
            return self._taken_from_idle()
        future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())
            raise

    def release(self, slot: Slot) -> None:
        """Give a slot back; it is removed in the background. A second time has no effect."""
        if slot.index in self._used:
            self._used.remove(slot.index)
            self._policies.pop(slot.index, None)
            self._doomed.add(slot.index)
            self._wake.set()
            if self._proxy is not None:
                self._proxy.dismiss(slot.index)

    async def apply(self, slot: Slot, policy: NetworkPolicy) -> None:
        """See `SlotSource`; a policy that the slot's rules hold already costs next to nothing."""
        builder, proxy = self._builder, self._proxy
        if builder is None or proxy is None or slot.index not in self._used:
            raise HostFailure("The network slot of the sandbox is gone")
        before = self._policies.pop(slot.index, None)
        if policy.by_name and policy != before:
            await proxy.admit(slot, policy)
        await builder.open(slot.index, policy, before)
        if not policy.by_name or slot.index not in self._used:
            proxy.dismiss(slot.index)
        if slot.index in self._used:
            self._policies[slot.index] = policy

    def applied(self, slot: Slot) -> NetworkPolicy | None:
        """The policy that the slot's rules hold; None when that is not known."""
        return self._policies.get(slot.index)

    def denials(self, slot: Slot) -> Denials | None:
        """See `SlotSource`."""
        return None if self._proxy is None else self._proxy.denials(slot.index)

    def metrics(self) -> SlotMetrics:
        """A slot that is being removed counts as used."""
        return SlotMetrics(
            used=len(self._used | self._doomed), ready=len(self._idle), capacity=self._capacity
        )

    def traffic(self) -> dict[int, Traffic]:
        """See `SlotSource`: what the host's ends of the slots have counted."""
        return building.traffic(self._tag)

    async def close(self, keep: Set[int] = frozenset()) -> None:
        """Remove every slot that is not in `keep`, and the host's rules when none is kept.

        A second time has no effect.
        """
        self._closing = True
        self._wake.set()
        if self._worker is not None:
            await asyncio.wait([self._worker])
            self._worker = None
        async with self._undo:
            builder, self._builder = self._builder, None
            if builder is None:
                return
            kept = self._used & keep
            gone = self._taken()
            self._idle.clear()
            self._used.clear()
            self._doomed.clear()
            try:
                await builder.remove(gone - kept)
            finally:
                if not kept:
                    await asyncio.to_thread(builder.disconnect_host)

    def _claim(self, undo: AsyncExitStack) -> AddressPlan:
        self._runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = DirectoryLock(self._runtime_dir / f"server-{self._tag}.lock")
        if not lock.acquire():
            raise HostFailure("Another server is using this data directory")
        undo.callback(lock.release)
        network = self._settings.network_cidr
        note_tag(self._settings.data_dir)
        candidates = blocks_of(network, self._tag)
        before = building.block_of_leftovers(self._tag, candidates)
        if before is not None:
            candidates = [before, *candidates]
        used = building.networks_in_use(self._tag, network)
        block, block_lock = claim_block(candidates, used, self._runtime_dir)
        undo.callback(block_lock.release)
        return AddressPlan(self._tag, network, block, self._settings.vmm_uid_base)

    async def _work(self, plan: AddressPlan, builder: SlotBuilder) -> None:
        while not self._closing:
            await self._wake.wait()
            self._wake.clear()
            while not self._closing and await self._step(plan, builder):
                pass
        self._refuse(HostFailure(_CLOSED))

    async def _step(self, plan: AddressPlan, builder: SlotBuilder) -> bool:
        """Do the most urgent piece of work; False when there is none."""
        wanted = sum(not future.done() for future in self._waiting)
        room = plan.capacity - len(self._taken())
        missing = min(self._settings.slot_pool_size - len(self._idle), room)
        try:
            if wanted and room:
                await self._make(plan, builder, min(wanted, BATCH))
            elif self._doomed:
                await self._remove(builder)
            elif wanted:
                raise NoCapacity("This machine has no network address left for another sandbox")
            elif missing > 0 and self._idle and (pause := self._gives_way()) > 0:
                asyncio.get_running_loop().call_later(pause, self._wake.set)
                return False
            elif missing > 0:
                await self._make(plan, builder, min(missing, BATCH))
            else:
                return False
            self._retry_sec = RETRY_SEC
        except Exception as error:
            detail = error.detail if isinstance(error, WrennError) else repr(error)
            _log.error("work on network slots failed", error=str(error), detail=detail)
            if not self._refuse(error):
                asyncio.get_running_loop().call_later(self._retry_sec, self._wake.set)
                self._retry_sec = min(2 * self._retry_sec, MAX_RETRY_SEC)
                return False
        return True

    def _gives_way(self) -> float:
        """Seconds to wait before slots are made that nobody waits for."""
        until = min(self._last_taken + GIVE_WAY_SEC, self._first_taken + GIVE_WAY_LIMIT_SEC)
        return until - time.monotonic()

    async def _make(self, plan: AddressPlan, builder: SlotBuilder, count: int) -> None:
        indices = self._choose(plan, count)
        try:
            await builder.make(indices)
        except BaseException:
            self._rest(indices)
            raise
        self._policies.update(dict.fromkeys(indices, NetworkPolicy()))
        self._idle.extend(plan.slot(index) for index in indices)
        while self._idle and (future := self._next_waiting()) is not None:
            future.set_result(self._taken_from_idle())

    async def _remove(self, builder: SlotBuilder) -> None:
        indices = set(sorted(self._doomed)[:REMOVAL_BATCH])
        await builder.remove(indices)
        self._doomed -= indices
        self._rest(indices)

    def _rest(self, indices: Set[int] | Sequence[int]) -> None:
        until = time.monotonic() + self._settings.slot_cooldown_sec
        self._resting.update(dict.fromkeys(indices, until))

    def _taken(self) -> set[int]:
        return self._used | self._doomed | {slot.index for slot in self._idle}

    def _choose(self, plan: AddressPlan, count: int) -> list[int]:
        """Numbers nobody has; those still cooling down only when there are no others."""
        now = time.monotonic()
        self._resting = {index: end for index, end in self._resting.items() if end > now}
        taken = self._taken()
        unused = [index for index in range(plan.capacity) if index not in taken]
        unused.sort(key=lambda index: self._resting.get(index, 0.0))
        return unused[:count]

    def _refuse(self, error: Exception) -> bool:
        """Hand the error to everybody who waits; False when nobody does."""
        if not isinstance(error, HostFailure | NoCapacity):
            error = HostFailure("A network slot could not be made")
        refused = False
        while (future := self._next_waiting()) is not None:
            future.set_exception(error)
            refused = True
            self.refusals += isinstance(error, NoCapacity)
        return refused

    def _next_waiting(self) -> "asyncio.Future[Slot] | None":
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                return future
        return None

    def _taken_from_idle(self) -> Slot:
        slot = self._idle.popleft()
        self._used.add(slot.index)
        return slot
