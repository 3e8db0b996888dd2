"""Requests that may be repeated: one with a key that was there before gets the first one's answer.

The id of what a request makes is chosen and written down before it is made. So where the server
dies before the answer is kept, the next start knows whether there is such a thing. Only successes
are kept: after a failure the next request with the same key tries again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from wrenn_sandbox.aio import ended
from wrenn_sandbox.control.store.records import KeyedRequest
from wrenn_sandbox.errors import KeyReused
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.limits import IDEMPOTENCY_KEPT_SEC

from .context import ControlContext

KEPT: Final = timedelta(seconds=IDEMPOTENCY_KEPT_SEC)

_Place = tuple[TeamId, str, str]


@dataclass(frozen=True, slots=True)
class Making:
    """How a request makes something, each with the id that was chosen for it, to be answered.

    `made` says what is there of it, None where nothing is.
    """

    subject: str
    make: Callable[[str], Awaitable[str]]
    made: Callable[[str], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """`repeated`: another request got it before."""

    text: str
    repeated: bool


class Idempotency:
    def __init__(self, context: ControlContext) -> None:
        self._store = context.store.idempotency_keys
        self._clock = context.clock
        self._under_way: dict[_Place, tuple[str, asyncio.Task[Answer]]] = {}

    async def answer(
        self, team_id: TeamId, operation: str, key: str, digest: str, making: Making
    ) -> Answer:
        """What the first request with this key was answered, this one where it is the first.

        Waits for the first one where it is under way. The work goes on without its caller. Raises
        `KeyReused` where the first one was another request, and what making raises.
        """
        place = (team_id, operation, key)
        request = KeyedRequest(
            team_id, operation, key, digest, making.subject, created_at=self._clock()
        )
        if (under_way := self._under_way.get(place)) is not None:
            first, task = under_way
            _require_same(first, digest)
            return Answer((await asyncio.shield(task)).text, repeated=True)
        task = asyncio.create_task(self._answer(request, making), name=f"{operation} with a key")
        self._under_way[place] = digest, task
        task.add_done_callback(lambda done: self._ended(place, done))
        return await asyncio.shield(task)

    async def _answer(self, request: KeyedRequest, making: Making) -> Answer:
        first = await self._store.begin(request, request.created_at - KEPT)
        _require_same(first.digest, request.digest)
        if first.answer is not None:
            return Answer(first.answer, repeated=True)
        if first.subject != request.subject:
            # the server died before it could keep an answer
            found = await making.made(first.subject)
            if found is not None:
                await self._store.complete(first, found)
                return Answer(found, repeated=True)
            await self._store.forget(first)
            await self._store.begin(request, request.created_at)
        try:
            text = await making.make(request.subject)
        except Exception:
            await self._store.forget(request)
            raise
        await self._store.complete(request, text)
        return Answer(text, repeated=False)

    async def close(self, grace: float) -> None:
        """Give what runs `grace` seconds, then cancel it."""
        await ended([task for _, task in self._under_way.values()], grace)

    def _ended(self, place: _Place, task: asyncio.Task[Answer]) -> None:
        del self._under_way[place]
        if not task.cancelled():
            task.exception()


def _require_same(first: str, digest: str) -> None:
    if first != digest:
        raise KeyReused(
            "Idempotency-Key: this key came with another request before; choose a new one"
        )
