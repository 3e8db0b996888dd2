"""Delivers events to webhooks: in order for each, again and again, from a cursor in the database.

What is due is looked for when this server has committed something, and every second. A webhook is
claimed, gets what has happened since its last event, and is left when something fails: the next
attempt has a time of its own. So one webhook waits for nobody, and those behind a failed event
wait for it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final
from urllib.parse import urlsplit

import msgspec
import structlog

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.control.outbound import Caller, NotDelivered
from wrenn_sandbox.control.store.records import Delivery, Outcome, Webhook
from wrenn_sandbox.control.store.webhooks import CLAIM
from wrenn_sandbox.errors import RateLimited
from wrenn_sandbox.ids import Random, TeamId, WebhookId, new_random
from wrenn_sandbox.model.events import matches
from wrenn_sandbox.model.webhooks import DISABLE_AFTER, GIVE_UP_AFTER, delay_after, signature

from .context import ControlContext
from .events import Message

_log = structlog.get_logger(__name__)
_POLL_SEC: Final = 1.0
_PAUSE_SEC: Final = 0.05
"""Between two looks at what is due: what is committed meanwhile is found by one."""

AT_ONCE: Final = 128
_PER_TEAM: Final = 4
_PER_HOST: Final = 8
"""How many deliveries go on at once: in all, of a team, and to a host."""

_TURN: Final = 20
"""Deliveries to a webhook until others have their turn."""

_BATCH: Final = 100


@dataclass(frozen=True, slots=True)
class _Answer:
    """How one request went."""

    status: int | None
    error: str | None
    duration_ms: int

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def delivery(
        self, id: WebhookId, message: Message, attempt: int, outcome: Outcome, at: datetime
    ) -> Delivery:
        return Delivery(
            webhook_id=id,
            event_id=message.id,
            type=message.type,
            attempt=attempt,
            outcome=outcome,
            status=self.status,
            error=self.error,
            duration_ms=self.duration_ms,
            at=at,
        )


class Deliveries:
    def __init__(self, context: ControlContext, *, random: Random = new_random) -> None:
        self._store = context.store
        self._clock = context.clock
        self._metrics = context.metrics
        self._random = random
        self._caller: Caller | None = None
        self._under_way: dict[WebhookId, asyncio.Task[None]] = {}
        self._slots: Counter[str] = Counter()
        self._wakeup = asyncio.Event()
        context.store.listen(self._note)

    def _note(self, _: TeamId) -> None:
        self._wakeup.set()

    @asynccontextmanager
    async def through(self, caller: Caller) -> AsyncIterator[None]:
        """Deliver by `caller` as long as the block lasts."""
        self._caller = caller
        try:
            yield
        finally:
            self._caller = None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    async with asyncio.timeout(_POLL_SEC):
                        await self._wakeup.wait()
                except TimeoutError:
                    pass
                self._wakeup.clear()
                try:
                    await self._start_due(tasks)
                except Exception:
                    _log.exception("webhooks not read")
                await asyncio.sleep(_PAUSE_SEC)

    async def _start_due(self, tasks: asyncio.TaskGroup) -> None:
        for webhook in await shielded(self._store.webhooks.due(self._clock(), _PER_TEAM)):
            slots = _slots_of(webhook)
            if webhook.id in self._under_way or not self._has_room(slots):
                continue
            self._slots.update(slots)
            task = tasks.create_task(self._deliver(webhook.id))
            self._under_way[webhook.id] = task
            task.add_done_callback(partial(self._ended, webhook.id, slots))

    def _ended(
        self, webhook_id: WebhookId, slots: tuple[str, ...], _: "asyncio.Task[None]"
    ) -> None:
        del self._under_way[webhook_id]
        self._free(slots)
        self._wakeup.set()

    def _has_room(self, slots: tuple[str, ...]) -> bool:
        limits = (AT_ONCE, _PER_TEAM, _PER_HOST)
        return all(self._slots[slot] < limit for slot, limit in zip(slots, limits, strict=True))

    def _free(self, slots: tuple[str, ...]) -> None:
        for slot in slots:
            self._slots[slot] -= 1
            if not self._slots[slot]:
                del self._slots[slot]

    async def _deliver(self, webhook_id: WebhookId) -> None:
        try:
            webhook = await shielded(self._store.webhooks.claim(webhook_id, self._clock()))
            if webhook is None:
                return
            for _ in range(_TURN):
                settled = await self._next(webhook)
                if settled is None or settled.retry_at is not None or settled.disabled_at:
                    break
                webhook = settled
            await shielded(self._store.webhooks.release(webhook_id))
        except Exception:
            # the claim is kept: it is tried again when that has run out
            _log.exception("webhook not served", webhook_id=webhook_id)
        except asyncio.CancelledError:
            await shielded(self._store.webhooks.release(webhook_id))
            raise

    async def _next(self, webhook: Webhook) -> Webhook | None:
        """Settle the next event that is wanted, or find that it cannot be for now.

        None where there is nothing more to do.
        """
        events = self._store.team(webhook.team_id).events
        last = await shielded(events.last())
        found = await shielded(events.after(webhook.position, _BATCH))
        missing = (found[0].number - 1 if found else last) - webhook.position
        if missing:
            return await self._skip(webhook, missing)
        if not found:
            return None
        event = next((each for each in found if matches(webhook.patterns, each.type)), None)
        if event is None:
            unwanted = {"position": found[-1].number, "claimed_until": self._clock() + CLAIM}
            return await shielded(self._store.webhooks.settle(webhook, None, unwanted))
        message = Message.of(event)
        answer = await self._post(webhook, message)
        return await shielded(self._settle(webhook, event.number, message, answer))

    async def _skip(self, webhook: Webhook, missing: int) -> Webhook | None:
        """Pass over events that were not kept until they could be delivered."""
        now, last = self._clock(), webhook.position + missing
        error = f"{missing} events up to this one could not be delivered and are not kept any more"
        lost = Delivery(
            webhook.id, str(last), "*", webhook.attempts, Outcome.FAILED, None, error, 0, now
        )
        return await shielded(self._store.webhooks.settle(webhook, lost, {"position": last}))

    async def _settle(
        self, webhook: Webhook, number: int, message: Message, answer: _Answer
    ) -> Webhook | None:
        now = self._clock()
        settled: dict[str, object] = {
            "position": number,
            "attempts": 0,
            "trying_since": None,
            "retry_at": None,
            "claimed_until": now + CLAIM,
        }
        attempts = webhook.attempts + 1
        if answer.is_success:
            outcome, changed = Outcome.DELIVERED, {**settled, "failing_since": None}
        else:
            trying_since = webhook.trying_since or now
            failing_since = webhook.failing_since or now
            if now - trying_since >= GIVE_UP_AFTER:
                outcome, changed = Outcome.FAILED, settled
            else:
                jitter = self._random(1)[0] / 255
                outcome = Outcome.RETRYING
                # a place before the event keeps what nobody wanted from being read again
                changed = {
                    "position": number - 1,
                    "attempts": attempts,
                    "trying_since": trying_since,
                    "retry_at": now + delay_after(attempts, jitter),
                }
            changed["failing_since"] = failing_since
            if now - failing_since >= DISABLE_AFTER:
                changed["disabled_at"] = now
                changed["disabled_reason"] = (
                    f"no delivery has succeeded since {failing_since:%Y-%m-%d %H:%M} UTC; "
                    f"the last one failed: {answer.error or f'status {answer.status}'}"
                )
                _log.warning("webhook disabled", webhook_id=webhook.id, team_id=webhook.team_id)
        self._metrics.delivery(outcome.value, answer.duration_ms / 1000)
        delivery = answer.delivery(webhook.id, message, attempts, outcome, now)
        return await self._store.webhooks.settle(webhook, delivery, changed)

    async def test(self, webhook: Webhook, message: Message) -> Delivery:
        """Deliver one message now, which changes nothing else; raises `RateLimited`."""
        with self._slot(webhook):
            answer = await self._post(webhook, message)
        outcome = Outcome.DELIVERED if answer.is_success else Outcome.FAILED
        delivery = answer.delivery(webhook.id, message, 1, outcome, self._clock())
        await self._store.webhooks.note(delivery)
        return delivery

    @contextmanager
    def _slot(self, webhook: Webhook) -> Iterator[None]:
        slots = _slots_of(webhook)
        if not self._has_room(slots):
            raise RateLimited("Too many deliveries are under way; try again", retry_after=1)
        self._slots.update(slots)
        try:
            yield
        finally:
            self._free(slots)

    async def _post(self, webhook: Webhook, message: Message) -> _Answer:
        body = msgspec.json.encode(message)
        timestamp = int(self._clock().timestamp())
        headers = {
            "Content-Type": "application/json",
            "Wrenn-Webhook-Id": webhook.id,
            "Wrenn-Event-Id": message.id,
            "Wrenn-Timestamp": str(timestamp),
            "Wrenn-Signature": signature(webhook.secret, timestamp, body),
        }
        begin = time.monotonic()
        assert self._caller is not None
        try:
            status = await self._caller.post(webhook.url, headers, body, webhook.team_id)
            error = None
        except NotDelivered as failure:
            status, error = None, str(failure)
        return _Answer(status, error, round((time.monotonic() - begin) * 1000))


def _slots_of(webhook: Webhook) -> tuple[str, ...]:
    return "all", webhook.team_id, f"host {urlsplit(webhook.url).hostname}"
