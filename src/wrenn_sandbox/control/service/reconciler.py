"""Compares what is wanted (the store) with what runs (the host), and corrects each difference.

A sandbox with an operation in this process at any time during the comparison, or with one under
way at the host, is left alone, and looked at again soon: who asks for it over and over would else
keep it from being corrected. Each correction is an operation of its own whose transitions are
guarded like all others, so it cannot undo what a request has just done.
"""

import asyncio
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.control.store.records import Rollback, Sandbox, SnapshotIntent
from wrenn_sandbox.control.store.sandboxes import Change, Missing
from wrenn_sandbox.errors import NotFound, WrennError
from wrenn_sandbox.ids import SandboxId, new_operation_id
from wrenn_sandbox.model.sandbox import Event, IllegalTransition, State
from wrenn_sandbox.wire.messages import Phase, SandboxReport

from .context import ControlContext
from .corrections import CORRECTIONS, Correction
from .idempotency import KEPT
from .images import DiscardedImages
from .injections import Injections
from .lifecycle import Lifecycle, rebooted
from .network import NetworkPolicies
from .snapshots import REASON

_log = structlog.get_logger(__name__)
_ACTOR = "reconciler"
_INTERRUPTED = "the server stopped meanwhile"
_FINISHED = "the rollback was finished although its answer was lost"
_POLICIES_SEC = 5.0
"""How long a sweep waits for all policies that it has set going."""
_DISK_STEP = 1 << 20
_SOON_SEC = 1.0
_LIVE = [state for state in State if state not in (State.STOPPED, State.ERROR)]


class Reconciler:
    def __init__(
        self,
        context: ControlContext,
        lifecycle: Lifecycle,
        images: DiscardedImages,
        policies: NetworkPolicies,
        injections: Injections,
    ) -> None:
        self._injections = injections
        self._store = context.store
        self._host = context.host
        self._operations = context.operations
        self._lifecycle = lifecycle
        self._images = images
        self._policies = policies
        self._metrics = context.metrics
        self._wakeup = context.wakeups.reconciler
        self._interval = context.settings.reconcile_interval_sec
        self._retention = timedelta(seconds=context.settings.retention_sec)
        self._turn = asyncio.Lock()
        self._clock = context.clock

    async def run(self) -> None:
        """Sweep every `interval` seconds, and whenever the wake-up is set."""
        while True:
            self._wakeup.clear()
            try:
                await shielded(self.sweep())
            except Exception:
                _log.exception("reconciliation failed")
            try:
                async with asyncio.timeout(self._interval):
                    await self._wakeup.wait()
            except TimeoutError:
                pass

    async def sweep(self) -> None:
        """Compare once and correct what differs, after whoever does so already."""
        async with self._turn:
            await self._sweep()
            self._metrics.swept()

    async def _sweep(self) -> None:
        left_alone = False
        with self._operations.watch() as touched:
            reports = {report.sandbox_id: report for report in await self._host.sandboxes()}
            live = {each.id: each for each in await self._store.all_sandboxes.in_states(_LIVE)}
            intents = {each.sandbox_id: each for each in await self._store.snapshots.intents()}
            rollbacks = {each.sandbox_id: each for each in await self._store.rollbacks.all()}
            versions = await self._injections.versions(live.values())
            policies: list[asyncio.Task[None]] = []
            for sandbox in live.values():
                report = reports.get(sandbox.id)
                if sandbox.id not in touched and not (report is not None and report.busy):
                    under_way = intents.get(sandbox.id), rollbacks.get(sandbox.id)
                    await self._check(sandbox, report, *under_way)
                    version = versions.get(sandbox.id)
                    if (policy := self._policy_for(sandbox, report, version)) is not None:
                        policies.append(self._operations.start(sandbox.id, policy))
                elif not self._operations.busy(sandbox.id):
                    phase = None if report is None else report.phase
                    left_alone |= (sandbox.state, phase) in CORRECTIONS
            if policies:  # a guest may have to be told, which has time: others do not wait for it
                await asyncio.wait(policies, timeout=_POLICIES_SEC)
            for report in reports.values():
                if report.sandbox_id not in touched | live.keys() and not report.busy:
                    await self._destroy_unwanted(report.sandbox_id)
            making = {each.id for each in live.values() if each.state is State.SNAPSHOTTING}
            busy = {each.sandbox_id for each in reports.values() if each.busy}
            for sandbox_id, intent in intents.items():
                if sandbox_id not in touched | making | busy:
                    change = self._interrupted(Event.CHECKPOINT_FAILED)
                    await self._store.snapshots.abandon(intent, change, change.at)
            for image in await self._store.snapshots.fork_images():
                if image.sandbox_id not in touched | busy:
                    await self._store.snapshots.end_fork(
                        image, self._interrupted(Event.FORK_FAILED)
                    )
        if left_alone:
            asyncio.get_running_loop().call_later(_SOON_SEC, self._wakeup.set)
        await self._note_disk(reports, live)
        await self._images.remove()
        await self._images.remove_unknown(self._clock())
        await self._store.all_sandboxes.remove_ended(self._clock() - self._retention)
        await self._store.idempotency_keys.remove_old(self._clock() - KEPT)

    async def _note_disk(
        self, reports: Mapping[SandboxId, SandboxReport], live: Mapping[SandboxId, Sandbox]
    ) -> None:
        """Write down what has changed enough to matter."""
        changed = {
            sandbox_id: report.disk_bytes
            for sandbox_id, report in reports.items()
            if report.disk_bytes is not None
            and (known := live.get(sandbox_id)) is not None
            and abs(report.disk_bytes - known.disk_bytes) >= _DISK_STEP
        }
        if changed:
            await self._store.all_sandboxes.note_disk(changed)

    async def _check(
        self,
        sandbox: Sandbox,
        report: SandboxReport | None,
        intent: SnapshotIntent | None,
        rollback: Rollback | None,
    ) -> None:
        phase = None if report is None else report.phase
        if sandbox.state is State.STOPPING:
            await self._attempt(sandbox.id, self._lifecycle.delete(sandbox.id, _ACTOR))
            return
        correction = CORRECTIONS.get((sandbox.state, phase))
        if correction is None:
            return
        if sandbox.state is State.SNAPSHOTTING and intent is not None:
            work = self._settle_snapshot(intent, phase, correction)
        elif sandbox.state is State.ROLLING_BACK and rollback is not None:
            work = self._settle_rollback(sandbox, rollback, phase, correction)
        else:
            work = self._correct(sandbox, report, correction)
        await self._attempt(sandbox.id, self._operations.run(sandbox.id, work))

    def _policy_for(
        self, sandbox: Sandbox, report: SandboxReport | None, version: str | None
    ) -> Coroutine[object, object, None] | None:
        """What gives the host of a running sandbox the policy that it should have."""
        if report is None or (sandbox.state, report.phase) != (State.RUNNING, Phase.RUNNING):
            return None
        if report.network != sandbox.network:
            return self._policies.apply_again(sandbox.id, _ACTOR)
        if report.injection != version:  # such as after a restart: hosts keep no values
            return self._policies.apply_values(sandbox.id)
        return None

    async def _correct(
        self, sandbox: Sandbox, report: SandboxReport | None, correction: Correction
    ) -> None:
        if correction.destroy:
            await self._host.destroy(sandbox.id, new_operation_id())
        placement = None if report is None else report.placement
        more = rebooted(placement) if Event.RESUMED in correction.events else None
        reason = "; ".join(each for each in (correction.reason, more) if each)
        now = self._clock()
        at = await self._last_seen(sandbox, now) if Event.LOST in correction.events else now
        changes = [
            Change(event, _ACTOR, at, reason, placement, noted_at=now)
            for event in correction.events
        ]
        await self._store.all_sandboxes.apply(sandbox.id, *changes)
        self._note(sandbox.id, correction)

    async def _last_seen(self, sandbox: Sandbox, now: datetime) -> datetime:
        """When a sandbox that is gone was alive for certain: no server ran when its VM ended."""
        if sandbox.running_since is None:
            return now
        sample = await self._host.last_sample(sandbox.id)
        seen = sandbox.last_updated
        if sample is not None:
            seen = max(seen, datetime.fromtimestamp(sample.time, UTC))
        return min(seen, now)

    async def _settle_snapshot(
        self, intent: SnapshotIntent, phase: Phase | None, correction: Correction
    ) -> None:
        if phase is None:
            try:
                image = await self._host.snapshot(
                    intent.sandbox_id, intent.operation_id, intent.image_id
                )
            except NotFound:
                _log.warning("snapshot lost", sandbox_id=intent.sandbox_id, name=intent.name)
            else:
                await self._store.snapshots.complete(
                    intent, image, Change(Event.SNAPSHOTTED, _ACTOR, self._clock(), REASON)
                )
                return
        change = Change(correction.events[0], _ACTOR, self._clock(), correction.reason)
        await self._store.snapshots.abandon(intent, change, self._clock())
        self._note(intent.sandbox_id, correction)

    async def _settle_rollback(
        self, sandbox: Sandbox, rollback: Rollback, phase: Phase | None, correction: Correction
    ) -> None:
        """Ask for it again, which does no harm: what is running may be one or the other."""
        event, reason, placement = correction.events[0], correction.reason, None
        if phase is not None:
            try:
                placement = await self._lifecycle.ask_for_rollback(sandbox, rollback)
                event, reason = Event.ROLLED_BACK, _FINISHED
            except WrennError as error:
                reason = f"{reason}: {error.message}"
        await self._lifecycle.end_rollback(sandbox.id, event, _ACTOR, reason, placement)
        self._note(sandbox.id, replace(correction, events=(event,), reason=reason))

    def _interrupted(self, event: Event) -> Change:
        return Change(event, _ACTOR, self._clock(), _INTERRUPTED)

    async def _destroy_unwanted(self, sandbox_id: SandboxId) -> None:
        _log.warning("destroying an unknown sandbox", sandbox_id=sandbox_id)
        self._metrics.correction("destroy_unknown")
        await self._attempt(
            sandbox_id,
            self._operations.run(sandbox_id, self._host.destroy(sandbox_id, new_operation_id())),
        )

    async def _attempt(self, sandbox_id: SandboxId, work: Awaitable[None]) -> None:
        try:
            await work
        except (IllegalTransition, Missing):
            _log.info("correction overtaken", sandbox_id=sandbox_id)
        except WrennError as error:
            _log.warning(
                "correction failed", sandbox_id=sandbox_id, error=error.message, detail=error.detail
            )

    def _note(self, sandbox_id: SandboxId, correction: Correction) -> None:
        for event in correction.events:
            self._metrics.correction(event.value)
        _log.warning("corrected", sandbox_id=sandbox_id, reason=correction.reason)
