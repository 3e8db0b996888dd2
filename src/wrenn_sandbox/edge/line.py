"""A connection to a port of a guest that a client's connection keeps between two requests."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, aclosing
from typing import Final

from wrenn_sandbox.errors import QuotaExceeded
from wrenn_sandbox.wire.guest import Guest

KEPT_SEC: Final = 2.0
"""How long a line may rest: a program may serve one connection at a time, and no other then."""

_closing: Final[set["asyncio.Task[None]"]] = set()


class Line:
    """Open until `close`, or until the VM's life ends; iterated it gives what comes back.

    `key` says for what it may be used again.
    """

    def __init__(self, key: object) -> None:
        self.key = key
        self._connection = AsyncExitStack()
        self._request: AsyncGenerator[bytes, None] | None = None
        self._asked = asyncio.Event()
        self._resting: asyncio.Task[bytes] | None = None
        self._pieces: AsyncIterator[bytes]

    @classmethod
    async def open(cls, guest: Guest, port: int, key: object) -> "Line":
        """Connect; raises what `Guest.connect` raises."""
        line = cls(key)
        connecting = guest.connect(port, line._sent())
        line._pieces = await line._connection.enter_async_context(connecting)
        return line

    def ask(self, request: AsyncGenerator[bytes, None]) -> None:
        """Send a request, whose end closes nothing; what it raises breaks the connection."""
        self._request = request
        self._asked.set()

    def rest(self) -> "asyncio.Task[bytes]":
        """From now on nothing may come: done when something does, be it the end."""
        self._resting = asyncio.create_task(self._read())
        return self._resting

    @property
    def is_at_rest(self) -> bool:
        """Whether another request may be sent."""
        return self._request is None and self._resting is not None and not self._resting.done()

    def __aiter__(self) -> "Line":
        return self

    async def __anext__(self) -> bytes:
        resting, self._resting = self._resting, None
        piece = await (self._read() if resting is None else resting)
        if not piece:
            raise StopAsyncIteration
        return piece

    async def close(self) -> None:
        """Cut the connection."""
        if self._resting is not None:
            self._resting.cancel()
            await asyncio.wait({self._resting})
        await self._connection.aclose()

    async def _read(self) -> bytes:
        return await anext(self._pieces, b"")

    async def _sent(self) -> AsyncGenerator[bytes, None]:
        while True:
            await self._asked.wait()
            self._asked.clear()
            assert self._request is not None
            async with aclosing(self._request) as request:
                async for piece in request:
                    yield piece
            self._request = None


class Keeper:
    """What one client's connection keeps: the line to a guest that rests, if there is one."""

    def __init__(self) -> None:
        self._line: Line | None = None
        self._held = ExitStack()
        self._closed = False

    def keep(self, line: Line, place: AbstractContextManager[None]) -> None:
        """Let a line rest, for a while and as long as nothing comes; its `place` is held then.

        It is closed where there is no place.
        """
        self.drop()
        try:
            self._held.enter_context(place)
        except QuotaExceeded:
            _close(line)
            return
        self._line = line
        line.rest().add_done_callback(lambda done: self._disturbed(line, done))
        self._held.callback(asyncio.get_running_loop().call_later(KEPT_SEC, self.drop).cancel)
        if self._closed:
            self.drop()

    def take(self, key: object) -> Line | None:
        """The line that rests, if it may be used for that; any other is closed."""
        line = self._line
        if line is None or line.key != key or not line.is_at_rest:
            self.drop()
            return None
        self._line = None
        self._held.close()
        return line

    def drop(self) -> None:
        """Close the line that rests."""
        line, self._line = self._line, None
        self._held.close()
        if line is not None:
            _close(line)

    def close(self) -> None:
        """Keep nothing any more: the client's connection has ended."""
        self._closed = True
        self.drop()

    def _disturbed(self, line: Line, resting: "asyncio.Task[bytes]") -> None:
        if not resting.cancelled():
            resting.exception()
        if self._line is line:
            self.drop()


def _close(line: Line) -> None:
    task = asyncio.create_task(line.close())
    _closing.add(task)
    task.add_done_callback(_closing.discard)
