"""One request to a port of a guest and its answer, passed on as they come.

A connection of its own leads to the guest, so nothing of one request can reach another one, and
none outlives the life of its VM. What one side does not take is not read from the other.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from wrenn_sandbox.aio import beside
from wrenn_sandbox.errors import PortError, Unauthorized, WrennError
from wrenn_sandbox.wire.guest import Guest

from .answer import SLICE, Answer
from .head import BadAnswer, Fields, Origin, answer_fields, request_head

CUT: Final = "wrenn.cut"
"""Key of the scope's state where the server keeps a function that breaks the connection."""

UPGRADABLE: Final = "wrenn.upgradable"
"""Key of the scope's state that says that an answer 101 makes this connection one of raw bytes.

What is received and sent afterwards is no body then, and its end that of a direction.
"""


class _ClientGone(Exception):
    pass


class Exchange:
    """A client's request and what becomes of it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, origin: Origin) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._origin = origin
        fields = dict(scope["headers"])
        self._chunked = b"transfer-encoding" in fields
        upgradable = scope.get("state", {}).get(UPGRADABLE, False)
        self._upgrade = fields.get(b"upgrade") if upgradable else None
        self._sent_all = asyncio.Event()
        """Set when nothing more comes from the client."""
        self._gone = False
        self.status = 0
        """Of the answer that the client got; 0 as long as there is none."""

    async def run(
        self,
        guest: Guest,
        port: int,
        target: bytes,
        *,
        extra: Fields | None = None,
        idle_sec: float,
        over: asyncio.Event | None = None,
    ) -> None:
        """Ask a port of the guest for `target`, with headers `extra` that are not the client's.

        Raises `WrennError` where the client can still be told; else its connection is cut. That
        happens, too, when for `idle_sec` seconds no byte came from either side, and when `over` is
        set: the client may not be here any more.
        """
        method: str = self._scope["method"]
        head = request_head(
            method,
            target,
            self._scope["headers"],
            self._origin,
            upgrade=self._upgrade,
            extra=extra or (),
        )
        answer = Answer(bodiless=method == "HEAD", upgradable=self._upgrade is not None)
        self._idle_sec = idle_sec
        try:
            async with (
                asyncio.timeout(idle_sec) as self._limit,
                beside(self._until(over)),
                guest.connect(port, self._sent(head)) as pieces,
            ):
                await self._answer(answer, pieces)
        except _ClientGone:
            return
        except TimeoutError as error:
            if not self._limit.expired():
                raise
            if over is not None and over.is_set():
                self._fail(Unauthorized("The credential is no longer valid"), error)
            self._fail(PortError(f"The program on port {port} did not answer in time"), error)
        except BadAnswer as error:
            detail = f"port {port}: {error}"
            self._fail(PortError(f"The answer of port {port} is not HTTP", detail=detail), error)
        except WrennError as error:
            if not self._gone:
                self._fail(error, error)

    async def _until(self, over: asyncio.Event | None) -> None:
        if over is not None:
            await over.wait()
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _fail(self, error: WrennError, cause: BaseException) -> None:
        if not self.status:
            raise error from cause
        cut: Callable[[str], None] | None = self._scope.get("state", {}).get(CUT)
        if cut is None:
            raise error from cause
        cut(error.message)

    # to the guest

    async def _sent(self, head: bytes) -> AsyncIterator[bytes]:
        yield head
        more = True
        while more:
            message = await self._received()
            more = message.get("more_body", False)
            body = message.get("body", b"")
            if body:
                yield b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body
        if self._chunked:
            yield b"0\r\n\r\n"
        self._sent_all.set()
        while self.status != 101:  # servers take a closed direction for a client that has left
            await self._received()

    async def _received(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
            self._sent_all.set()
            raise _ClientGone
        self._alive()
        return message

    # to the client

    async def _answer(self, answer: Answer, pieces: AsyncIterator[bytes]) -> None:
        async for piece in pieces:
            self._alive()
            for part in _slices(piece) if not answer.upgraded else (piece,):
                body = answer.feed(part)
                await self._pass_on(answer, body)
            if answer.complete:
                return
        answer.end()
        await self._pass_on(answer, b"", at_end=True)
        if answer.upgraded:
            await self._sent_all.wait()

    async def _pass_on(self, answer: Answer, body: bytes, *, at_end: bool = False) -> None:
        if answer.begun and not self.status:
            fields = answer_fields(answer.fields, answer.status, own_origin=self._origin.own)
            if answer.upgraded:
                upgrade = [each for each in answer.fields if each[0] == b"upgrade"]
                fields += [(b"connection", b"Upgrade"), *upgrade]
            self.status = answer.status
            head = {"type": "http.response.start", "status": answer.status, "headers": fields}
            await self._send(head)
        over = answer.complete or at_end
        if body or over:
            await self._send({"type": "http.response.body", "body": body, "more_body": not over})

    def _alive(self) -> None:
        self._limit.reschedule(asyncio.get_running_loop().time() + self._idle_sec)


def _slices(piece: bytes) -> Iterator[bytes]:
    for start in range(0, len(piece), SLICE):
        yield piece[start : start + SLICE]


def target_of(scope: Scope) -> bytes:
    """What a request asks for, as it came."""
    path: bytes = scope["raw_path"]
    query: bytes = scope["query_string"]
    return b"%b?%b" % (path, query) if query else path
