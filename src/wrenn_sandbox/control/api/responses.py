"""Answers that hold something, and what the routes say of their failures in OpenAPI."""

from contextlib import AbstractAsyncContextManager
from typing import Final

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_PIECE_BYTES: Final = 256 * 1024
"""Bytes of an answer that are handed to the server at once."""

_MEANING: Final = {
    400: "The body, a field or a query value is not acceptable",
    401: "The credential is missing or not valid",
    403: "The credential or the server does not allow this",
    404: "There is no such thing, or it belongs to another team",
    409: "The state of things does not allow this",
    410: "What follows this id is not kept any more",
    413: "The body is too large",
    429: "Too many attempts, or a limit of the team is reached",
    502: "The host or the agent in the guest failed",
    503: "The host is full or shutting down",
    504: "The command hit its time limit; error.stdout and error.stderr hold its output",
    507: "The disk of the sandbox is full",
}


class HeldResponse(Response):
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
        last = max(len(body) - 1, 0) // _PIECE_BYTES * _PIECE_BYTES
        for begin in range(0, last, _PIECE_BYTES):
            piece = body[begin : begin + _PIECE_BYTES]
            await send({**message, "body": piece, "more_body": True})
        await send({**message, "body": body[last:]} if last else message)

    return sending


def failures(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The `responses` of a route that may fail with these statuses."""
    return {
        status: {"model": Error, "description": _MEANING[status]} for status in sorted(statuses)
    }


class ErrorDetail(BaseModel):
    """`code` is for programs, `message` says what to do; some codes add keys."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class Error(BaseModel):
    error: ErrorDetail
