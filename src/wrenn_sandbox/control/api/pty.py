"""`WS /v1/sandboxes/{id}/pty`: a terminal, which stays when its client goes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field, TypeAdapter
from starlette.websockets import WebSocket

from wrenn_sandbox.control.service.guests import Guest, GuestService
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.wire.messages import ProcessRef, TerminalSize
from wrenn_sandbox.wire.streams import ProcessStream

from .authentication import NEEDS_KEY_OR_TOKEN, CallerTeam
from .exec_stream import not_a_websocket
from .frames import PtyStarted, TerminalFrames
from .responses import failures
from .services import services_of
from .session import Session
from .sockets import Malformed, Socket
from .stream_messages import (
    Action,
    End,
    Input,
    KillMessage,
    PtyConnectMessage,
    PtyInputMessage,
    PtyStartMessage,
    Resize,
    ResizeMessage,
)

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])

_FIRST: TypeAdapter[BaseModel] = TypeAdapter(
    Annotated[PtyStartMessage | PtyConnectMessage, Field(discriminator="type")]
)
_MESSAGES: TypeAdapter[BaseModel] = TypeAdapter(
    Annotated[PtyInputMessage | ResizeMessage | KillMessage, Field(discriminator="type")]
)


def _action_of(message: BaseModel) -> Action:
    match message:
        case PtyInputMessage():
            return Input(message.data)
        case ResizeMessage():
            return Resize(TerminalSize(cols=message.cols, rows=message.rows))
        case KillMessage():
            return End(grace=False)
    raise Malformed("type: must be input, resize or kill")


@asynccontextmanager
async def _terminal(
    guests: GuestService, guest: Guest, first: BaseModel
) -> AsyncIterator[tuple[str, ProcessStream]]:
    """The tag and the stream of a new terminal, or of the one that `first` names."""
    match first:
        case PtyConnectMessage():
            async with guest.attach(ProcessRef(tag=first.tag), replay=True) as stream:
                yield first.tag, stream
        case PtyStartMessage():
            tag = await guests.tag_for(guest, first.tag)
            size = TerminalSize(cols=first.cols, rows=first.rows)
            async with guest.start(first.command, tag=tag, terminal=size) as stream:
                yield tag, stream
        case _:
            raise InvalidRequest("type: must be start or connect")


@router.websocket("/{id}/pty")
async def pty(websocket: WebSocket, id: str) -> None:
    """Open a terminal, or come back to one by its tag."""
    socket = Socket(websocket)
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
            session = Session(
                socket,
                guest,
                stream,
                TerminalFrames(),
                _MESSAGES,
                _action_of,
                terminal=True,
                ends_with_client=False,
                pings=True,
            )
            await session.run()


@router.get(
    "/{id}/pty",
    operation_id="openTerminal",
    status_code=101,
    dependencies=NEEDS_KEY_OR_TOKEN,
    responses=failures(400, 401, 404, 409, 429),
)
async def describe_pty(id: str, team_id: CallerTeam) -> None:
    """A WebSocket: a terminal in the sandbox, as docs/websockets.md says."""
    raise not_a_websocket()
