"""What happens to what a team has, as it happens, for all who follow it.

Events are read once for a team however many follow it, and the last ones are kept in memory. What
this server commits wakes the feed at once. It looks once a second too: another process may commit
to the same database.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

import msgspec
import structlog

from wrenn_sandbox.aio import shielded
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.control.store.records import TeamEvent
from wrenn_sandbox.errors import Gone, QuotaExceeded
from wrenn_sandbox.ids import KeyId, TeamId, UserId
from wrenn_sandbox.model.events import KEPT_FOR
from wrenn_sandbox.model.limits import EVENT_STREAMS_PER_CALLER, EVENT_STREAMS_PER_TEAM

from .callers import Caller
from .context import ControlContext
from .tokens import Claims

_log = structlog.get_logger(__name__)
_POLL_SEC: Final = 1.0
_REMOVE_EVERY: Final = timedelta(minutes=10)
_BATCH: Final = 100
_IN_MEMORY: Final = 200
_SOON_SEC: Final = 1.0


class Message(msgspec.Struct, frozen=True):
    """An event as it is told, over a stream or to a webhook; `data` is JSON as it is."""

    id: str
    team_id: str
    type: str
    time: datetime
    data: msgspec.Raw

    @classmethod
    def of(cls, event: TeamEvent) -> "Message":
        return cls(
            id=str(event.number),
            team_id=event.team_id,
            type=event.type,
            time=event.at,
            data=msgspec.Raw(event.data.encode("utf-8")),
        )


@dataclass(slots=True)
class _Tail:
    """The last events of a team that is followed: all of them up to the number `last`."""

    last: int
    followers: int = 0
    events: deque[TeamEvent] = field(default_factory=lambda: deque(maxlen=_IN_MEMORY))
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, found: Sequence[TeamEvent]) -> None:
        if found[0].number != self.last + 1:
            self.events.clear()
        self.events.extend(found)
        self.last = found[-1].number
        self.moved.set()
        self.moved = asyncio.Event()

    def after(self, number: int) -> list[TeamEvent] | None:
        """What follows the event of this number; None where not all of that is in memory."""
        if not self.events or self.events[0].number > number + 1:
            return None
        return [each for each in self.events if each.number > number][:_BATCH]


class Follower:
    """One who follows the events of a team, and how far they have come."""

    def __init__(self, store: Store, team_id: TeamId, tail: _Tail) -> None:
        self._events = store.team(team_id).events
        self._tail = tail
        self.position = 0
        """The number of the last event that was handed out."""

    async def begin(self, after: int | None) -> None:
        """Start behind the event of this number, or with what happens from now on.

        Raises `Gone` where what follows that event is not kept, or there has been no such event.
        """
        last = await self._events.last()
        self.position = last if after is None else after
        if self.position < last:
            await self._stored()
        elif self.position > last:
            raise _gone()

    async def next(self, seconds: float) -> list[TeamEvent]:
        """What has happened since; empty when that was nothing for so long. Raises `Gone`."""
        try:
            async with asyncio.timeout(seconds):
                while self.position >= self._tail.last:
                    await self._tail.moved.wait()
        except TimeoutError:
            return []
        found = self._tail.after(self.position) or await self._stored()
        self.position = found[-1].number
        return found

    async def _stored(self) -> list[TeamEvent]:
        found = await shielded(self._events.after(self.position, _BATCH))
        if not found or found[0].number != self.position + 1:
            raise _gone()
        return found


class EventFeed:
    def __init__(self, context: ControlContext) -> None:
        self._store = context.store
        self._metrics = context.metrics
        self._clock = context.clock
        self._tails: dict[TeamId, _Tail] = {}
        self._by_caller: Counter[KeyId | UserId] = Counter()
        self._committed: set[TeamId] = set()
        self._wakeup = asyncio.Event()
        self._version: int | None = None
        self._removed_at: datetime | None = None
        context.store.listen(self._note)

    @contextmanager
    def follow(self, caller: Caller) -> Iterator[Follower]:
        """A follower of the caller's team until the end of the block; raises `QuotaExceeded`."""
        match caller.credential:
            case Claims(user_id):
                who: KeyId | UserId = user_id
            case key_id:
                who = key_id
        tail = self._tails.get(caller.team_id) or _Tail(last=0)
        _require("event_streams_per_caller", self._by_caller[who], EVENT_STREAMS_PER_CALLER)
        _require("event_streams_per_team", tail.followers, EVENT_STREAMS_PER_TEAM)
        self._tails[caller.team_id] = tail
        self._by_caller[who] += 1
        tail.followers += 1
        self._metrics.event_streams(+1)
        self._note(caller.team_id)
        try:
            yield Follower(self._store, caller.team_id, tail)
        finally:
            tail.followers -= 1
            self._metrics.event_streams(-1)
            if not tail.followers:
                del self._tails[caller.team_id]
            self._by_caller[who] -= 1
            if not self._by_caller[who]:
                del self._by_caller[who]

    async def page(self, team_id: TeamId, limit: int | None, before: int | None) -> list[TeamEvent]:
        """A team's events that are kept, newest first, below the number `before`."""
        return await self._store.team(team_id).events.page(limit, before)

    def _note(self, team_id: TeamId) -> None:
        if team_id in self._tails:
            self._committed.add(team_id)
            self._wakeup.set()

    async def run(self) -> None:
        now = asyncio.get_running_loop().time
        poll_at = now() + _POLL_SEC
        while True:
            try:
                async with asyncio.timeout_at(poll_at):
                    await self._wakeup.wait()
            except TimeoutError:
                pass
            self._wakeup.clear()
            everywhere = now() >= poll_at
            if everywhere:
                poll_at = now() + _POLL_SEC
            try:
                await shielded(self._look(everywhere=everywhere))
            except Exception:
                _log.exception("events not read")
                self._version = None

    async def _look(self, *, everywhere: bool) -> None:
        """Read what is new for the teams that something was committed for, or for all of them."""
        teams, self._committed = self._committed, set()
        if everywhere:
            await self._remove_old()
            if await self._has_changed():
                teams = set(self._tails)
        for team_id, last in (await self._last(teams)).items():
            tail = self._tails.get(team_id)
            if tail is None:
                continue
            if tail.last == 0:
                tail.last = max(0, last - _IN_MEMORY)
            while tail.last < last:
                found = await self._store.team(team_id).events.after(tail.last, _BATCH)
                if not found:
                    break
                tail.add(found)

    async def _last(self, teams: set[TeamId]) -> dict[TeamId, int]:
        return await self._store.events.last(teams) if teams else {}

    async def _has_changed(self) -> bool:
        if not self._tails:
            return False
        version = await self._store.version()
        changed = version is None or version != self._version
        self._version = version
        return changed

    async def _remove_old(self) -> None:
        now = self._clock()
        if self._removed_at is None or now - self._removed_at >= _REMOVE_EVERY:
            self._removed_at = now
            await self._store.events.remove_old(now - KEPT_FOR)


def _require(limit: str, used: int, most: int) -> None:
    if used >= most:
        raise QuotaExceeded(
            f"At most {most} streams of events may be open at once; close one",
            limit=limit,
            retry_after=_SOON_SEC,
        )


def _gone() -> Gone:
    return Gone(
        "What follows this event is not kept: read GET /v1/events, and follow on without an id"
    )
