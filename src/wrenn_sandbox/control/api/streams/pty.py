"""`WS /v1/sandboxes/{id}/pty`: a terminal, which stays when its client goes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Final

from fastapi import APIRouter
from pydantic import BaseModel, Field, TypeAdapter
from starlette.websockets import WebSocket

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.services import services_of
from wrenn_sandbox.control.service.calls import checked_command
from wrenn_sandbox.control.service.guests import GuestService
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.wire.guest import Guest
from wrenn_sandbox.wire.messages import (
    Channel,
    Ended,
    ProcessEvent,
    ProcessRef,
    ProcessStream,
    TerminalSize,
)

from .exec import not_a_websocket
from .frames import Frame, PtyOutput, PtyStarted
from .messages import (
    KillMessage,
    PongMessage,
    PtyConnectMessage,
    PtyInputMessage,
    PtyStartMessage,
    ResizeMessage,
)
from .session import Session
from .websocket import Socket, parsed

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])

SUBPROTOCOL: Final = "binary"
"""Asks for output in binary frames from the start."""

SILENCE_SECONDS: Final = 0.25
"""How long the first output waits for a frame that shows how the client speaks."""

_FIRST: TypeAdapter[PtyStartMessage | PtyConnectMessage] = TypeAdapter(
    Annotated[PtyStartMessage | PtyConnectMessage, Field(discriminator="type")]
)
_MESSAGES: TypeAdapter[BaseModel] = TypeAdapter(
    Annotated[
        PtyInputMessage | ResizeMessage | KillMessage | PongMessage, Field(discriminator="type")
    ]
)


class _Dialect:
    """How one client takes output: as JSON, or from its first binary frame on in binary frames.

    A binary frame of a client's is input as it is. Clients of both kinds begin with the same
    messages, so output is held back for a moment where nothing has told them apart.
    """

    def __init__(self, *, binary: bool) -> None:
        self._binary = binary
        self._known = asyncio.Event()
        if binary:
            self._known.set()

    def read(self, content: str | bytes) -> BaseModel | bytes:
        message = content if isinstance(content, bytes) else parsed(_MESSAGES, content)
        if isinstance(message, bytes):
            self._binary = True
        if isinstance(message, bytes | PtyInputMessage):
            self._known.set()
        return message

    async def held(self, events: AsyncIterator[ProcessEvent]) -> AsyncIterator[ProcessEvent]:
        """The same events, the first output when it is known how to send it."""
        async for event in events:
            if not (self._known.is_set() or isinstance(event, Ended)):
                with suppress(TimeoutError):
                    async with asyncio.timeout(SILENCE_SECONDS):
                        await self._known.wait()
                self._known.set()
            yield event

    def of(self, channel: Channel, data: bytes) -> list[Frame | bytes]:
        return [data if self._binary else PtyOutput(data)]

    def rest(self) -> list[Frame | bytes]:
        return []


@asynccontextmanager
async def _terminal(
    guests: GuestService, guest: Guest, first: PtyStartMessage | PtyConnectMessage
) -> AsyncIterator[tuple[str, ProcessStream]]:
    """The tag and the stream of a new terminal, or of the one that `first` names."""
    if isinstance(first, PtyConnectMessage):
        async with guest.attach_process(ProcessRef(tag=first.tag), replay=True) as stream:
            yield first.tag, stream
    else:
        tag = await guests.tag_for(guest, first.tag)
        size = TerminalSize(cols=first.cols, rows=first.rows)
        command = checked_command(first.command)
        async with guest.start_process(command, tag=tag, terminal=size) as stream:
            yield tag, stream


@router.websocket("/{id}/pty")
async def pty(websocket: WebSocket, id: str) -> None:
    """Open a terminal, or come back to one by its tag."""
    socket = Socket(websocket, SUBPROTOCOL)
    guests = services_of(websocket).guests
    async with (
        socket.reporting(),
        socket.authenticated() as team_id,
        guests.using(team_id, id) as guest,
    ):
        await socket.accept()
        first = await socket.first(_FIRST, "start or connect")
        async with _terminal(guests, guest, first) as (tag, stream):
            if stream.pid is None:
                raise InvalidRequest(await guests.reason_of(stream))
            await socket.send(PtyStarted(tag, stream.pid))
            dialect = _Dialect(binary=socket.subprotocol is not None)
            session = Session(
                socket,
                guest,
                ProcessStream(stream.pid, dialect.held(stream.events)),
                dialect,
                dialect.read,
                terminal=True,
                pings=True,
            )
            await session.run()


@router.get(
    "/{id}/pty",
    operation_id="openTerminal",
    status_code=101,
    responses=failures(400, 401, 404, 409, 429),
)
async def describe_pty(id: str, team_id: CallerTeam) -> None:
    """A WebSocket: a terminal in the sandbox, as docs/websockets.md says."""
    raise not_a_websocket()
