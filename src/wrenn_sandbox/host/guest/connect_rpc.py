"""Connect RPC framing, JSON codec only: see docs/design/guest.md.

An envelope is one flag byte, a four-byte big-endian length and JSON. The last envelope of a
stream has flag 0x02 and may hold an error.
"""

import asyncio
import re
import shlex
import struct
from collections.abc import AsyncIterator
from typing import Annotated, Final, TypeVar

import msgspec

from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    InvalidRequest,
    NoSpace,
    NotInGuest,
    WrennError,
)
from wrenn_sandbox.wire.messages import Command

ENVELOPE_LIMIT: Final = 1024 * 1024
"""Bytes of one message; the agent sends output in pieces of 64 KiB."""
_AT_ONCE: Final = 64
"""Messages that are taken one after the other before others have their turn."""
_HEAD: Final = struct.Struct(">BI")
_LAST: Final = 0x02
_MALFORMED: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the JSON which was asked for."""

T = TypeVar("T")


class RpcError(AgentError):
    """The guest agent refused a call; `rpc_code` is Connect's code."""

    def __init__(self, rpc_code: str, message: str) -> None:
        super().__init__(message)
        self.rpc_code = rpc_code


_CODES: Final = {
    400: "invalid_argument",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    409: "already_exists",
    412: "failed_precondition",
    429: "resource_exhausted",
}
"""What the statuses of plain routes mean, in Connect's words."""
_NO_SPACE: Final = 507
"""A status that says more than its code does."""


class _Error(msgspec.Struct):
    """RPC errors have a word for their code; those of plain routes repeat the status, or have
    the word too where the agent is an older one."""

    code: str | int = "unknown"
    message: str = ""


class _Last(msgspec.Struct):
    error: _Error | None = None


def envelope(message: bytes) -> bytes:
    """One envelope holding a JSON message."""
    return _HEAD.pack(0, len(message)) + message


async def messages(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The JSON messages of a stream up to its last envelope.

    Raises `RpcError` for an error at the end, `AgentError` for anything malformed or cut short.
    """
    buffer = bytearray()
    count = 0
    async for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start >= _HEAD.size:
            flags, length = _HEAD.unpack_from(buffer, start)
            if length > ENVELOPE_LIMIT or flags not in (0, _LAST):
                raise malformed("envelope head")
            end = start + _HEAD.size + length
            if len(buffer) < end:
                break
            message = bytes(buffer[start + _HEAD.size : end])
            start = end
            if flags == _LAST:
                if (error := decode(message, _Last).error) is not None:
                    raise _rpc_error(error)
                async for _ in chunks:
                    raise malformed("after end")
                return
            yield message
            count += 1
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)
        del buffer[:start]
    raise AgentError("The sandbox ended its answer too early")


def decode(data: bytes, kind: type[T]) -> T:
    """JSON that a guest has sent; raises `AgentError` where it is not of this kind."""
    try:
        return msgspec.json.decode(data, type=kind)
    except _MALFORMED as error:
        raise malformed(str(error)) from error


def malformed(detail: str) -> AgentError:
    """What a guest's answer that cannot be right is to the caller."""
    return AgentError("The sandbox sent a malformed answer", detail=detail)


def unary_error(status: int, body: bytes) -> RpcError:
    """The error of a call, RPC or plain, that was answered with an HTTP status above 299."""
    try:
        error = msgspec.json.decode(body, type=_Error)
    except _MALFORMED:
        error = _Error(message=f"The sandbox answered with status {status}.")
    return _rpc_error(error, status)


def _rpc_error(error: _Error, status: int = 0) -> RpcError:
    code = error.code if isinstance(error.code, str) else _CODES.get(status, "unknown")
    return RpcError(code[:64], words(error.message))


Pid = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
ExitCode = Annotated[int, msgspec.Meta(ge=0, le=255)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]

MESSAGE_LIMIT: Final = 2000
"""Characters of an error's message."""


def words(text: str) -> str:
    """A guest's message as callers, logs and terminals may see it: no control characters."""
    kept = text[:MESSAGE_LIMIT]
    return "".join(each if each.isprintable() else " " for each in kept)


_MEANING: dict[str, type[WrennError]] = {
    "not_found": NotInGuest,
    "invalid_argument": InvalidRequest,
    "permission_denied": InvalidRequest,
    "already_exists": Conflict,
    "failed_precondition": Conflict,
}


_SHELL: Final = re.compile(r"[\s|&;<>()$`*?]")
"""What makes a command line of a command's name."""

_LINE: Final = 256
"""Characters of a command line that is repeated to whoever sent it."""


def not_started(error: RpcError, command: Command) -> str:
    """Why a command could not be started; to a whole command line, how to have it run."""
    line = command.cmd
    if error.rpc_code != "not_found" or command.args or len(line) > _LINE:
        return error.message
    if not _SHELL.search(line):
        return error.message
    return f"{error.message}: commands run without a shell; use sh -c {shlex.quote(line)}"


def refusal(error: RpcError, status: int = 0) -> WrennError:
    """The platform's error for one of the agent's, given the HTTP status of an unary call."""
    if status == _NO_SPACE:
        return NoSpace(error.message)
    return _MEANING.get(error.rpc_code, AgentError)(error.message)
