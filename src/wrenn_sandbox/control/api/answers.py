"""Answers that keep something of the server's until their client has taken them."""

from contextlib import AbstractAsyncContextManager
from typing import Final

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

PIECE_BYTES: Final = 256 * 1024


class Held(Response):
    """The answer that a block gives: the block lasts until all but a piece of it was taken."""

    def __init__(self, answer: AbstractAsyncContextManager[Response]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answer as answer:
            await answer(scope, receive, _in_pieces(send))


def _in_pieces(send: Send) -> Send:
    """Waits for a slow client within a large body; the server itself does so between messages."""

    async def sending(message: Message) -> None:
        body = message.get("body", b"")
        last = max(len(body) - 1, 0) // PIECE_BYTES * PIECE_BYTES
        for begin in range(0, last, PIECE_BYTES):
            piece = body[begin : begin + PIECE_BYTES]
            await send({**message, "body": piece, "more_body": True})
        await send({**message, "body": body[last:]} if last else message)

    return sending
