"""One request to a port of a guest and its answer, passed on as they come.

A connection to the guest serves one request. Only behind a `GET` without a body may the same
client's connection use it for another such one, so nothing that a guest or a client sends too much
becomes part of anything of others; and none outlives the life of its VM. What one side does not
take is not read from the other.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from wrenn_sandbox.aio import beside, shielded
from wrenn_sandbox.errors import PortError, Unauthorized, WrennError
from wrenn_sandbox.wire.guest import Guest

from .answer import SLICE, Answer
from .head import BadAnswer, Fields, Origin, answer_fields, request_head
from .line import Keeper, Line

CUT: Final = "wrenn.cut"
"""Key of the scope's state where the server keeps a function that breaks the connection."""

KEEPER: Final = "wrenn.keeper"
"""Key of the scope's state where the server has the `Keeper` of this connection."""

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
        state = scope.get("state", {})
        self._upgrade = fields.get(b"upgrade") if state.get(UPGRADABLE) else None
        self._keeper: Keeper | None = state.get(KEEPER)
        if self._upgrade or self._chunked or b"content-length" in fields or not self._is_get():
            self._keeper = None
        self._sent_all = asyncio.Event()
        """Set when nothing more comes from the client."""
        self._gone = self._heard = self._answered = False
        self.status = 0
        """Of the answer that the client got; 0 as long as there is none."""

    async def run(
        self,
        guest: Guest,
        port: int,
        target: bytes,
        *,
        life: object,
        place: Callable[[], AbstractContextManager[None]],
        extra: Fields | None = None,
        idle_sec: float,
        over: asyncio.Event | None = None,
    ) -> None:
        """Ask a port of the guest for `target`, with headers `extra` that are not the client's.

        The connection may be kept for another request to the same `life` of a sandbox, as long as
        it has a `place`.

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
            keep=self._keeper is not None,
            extra=extra or (),
        )
        self._idle_sec = idle_sec
        self._over = over
        try:
            async with asyncio.timeout(idle_sec) as self._limit, AsyncExitStack() as stack:
                if over is not None:
                    await stack.enter_async_context(beside(self._until(over)))
                if self._keeper is None:
                    async with guest.connect(port, self._sent(head)) as pieces:
                        await self._answer(pieces)
                else:
                    await self._ask(self._keeper, guest, port, (life, port), head, place)
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

    async def _ask(
        self,
        keeper: Keeper,
        guest: Guest,
        port: int,
        key: object,
        head: bytes,
        place: Callable[[], AbstractContextManager[None]],
    ) -> None:
        line = keeper.take(key)
        is_new = line is None
        while True:
            if line is None:
                line = await Line.open(guest, port, key)
            try:
                line.ask(self._sent(head))
                reusable = await self._answer(line)
            except (BadAnswer, WrennError):
                await line.close()
                if is_new or self._heard or self._gone:
                    raise
                line, is_new = None, True  # the program had closed it: nothing was answered
            except BaseException:
                await shielded(line.close())
                raise
            else:
                if reusable:
                    keeper.keep(line, place())
                else:
                    await line.close()
                return

    async def _until(self, over: asyncio.Event) -> None:
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

    async def _sent(self, head: bytes) -> AsyncGenerator[bytes, None]:
        try:
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
            # servers take a closed direction for a client that has left
            while self.status != 101 and not self._answered:
                await self._received()
        finally:
            self._sent_all.set()

    async def _received(self) -> Message:
        message = await self._receive()
        if self._answered:
            return message
        if message["type"] == "http.disconnect":
            self._gone = True
            raise _ClientGone
        self._alive()
        return message

    # to the client

    async def _answer(self, pieces: AsyncIterator[bytes]) -> bool:
        """Pass an answer on; whether another request may follow on its connection."""
        bodiless = self._scope["method"] == "HEAD"
        answer = Answer(bodiless=bodiless, upgradable=self._upgrade is not None)
        async for piece in pieces:
            self._heard = True
            self._alive()
            start = 0
            while start < len(piece) and not answer.complete:
                end = start + answer.step
                await self._pass_on(answer, answer.feed(piece[start:end]))
                start = end
                if answer.step == SLICE:
                    await asyncio.sleep(0)  # neither what comes nor what is sent need be waited for
            if answer.complete:
                return answer.reusable and start >= len(piece)
        answer.end()
        await self._pass_on(answer, b"", at_end=True)
        if answer.upgraded:
            await self._sent_all.wait()
        return False

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
            self._answered = over and not answer.upgraded
            await self._send({"type": "http.response.body", "body": body, "more_body": not over})

    def _is_get(self) -> bool:
        return bool(self._scope["method"] == "GET")

    def _alive(self) -> None:
        if self._over is None or not self._over.is_set():
            self._limit.reschedule(asyncio.get_running_loop().time() + self._idle_sec)


def target_of(scope: Scope) -> bytes:
    """What a request asks for, as it came."""
    path: bytes = scope["raw_path"]
    query: bytes = scope["query_string"]
    return b"%b?%b" % (path, query) if query else path
