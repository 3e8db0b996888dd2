"""`WS /v1/sandboxes/{id}/exec/stream`: one command, followed while it runs."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field, TypeAdapter
from starlette.websockets import WebSocket

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.services import services_of
from wrenn_sandbox.control.service.calls import checked_command
from wrenn_sandbox.errors import InvalidRequest

from .frames import TextFrames
from .messages import (
    PongMessage,
    ResizeMessage,
    StartMessage,
    StdinCloseMessage,
    StdinMessage,
    StopMessage,
)
from .session import Session
from .websocket import Malformed, Socket, parsed

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])

_START: TypeAdapter[StartMessage] = TypeAdapter(StartMessage)
_MESSAGES: TypeAdapter[BaseModel] = TypeAdapter(
    Annotated[
        StdinMessage | StdinCloseMessage | ResizeMessage | StopMessage | PongMessage | StartMessage,
        Field(discriminator="type"),
    ]
)


def _read(content: str | bytes) -> BaseModel:
    message = parsed(_MESSAGES, content)
    if isinstance(message, StartMessage):
        raise Malformed("type: start comes once, as the first message")
    return message


def read_attached(content: str | bytes) -> BaseModel:
    """A message to a command that runs already: `start` has nothing to say there."""
    return parsed(_MESSAGES, content)


@router.websocket("/{id}/exec/stream")
async def exec_stream(websocket: WebSocket, id: str) -> None:
    """Run the command of the first message; it ends with the connection."""
    socket = Socket(websocket)
    async with (
        socket.reporting(),
        socket.authenticated() as team_id,
        services_of(websocket).guests.using(team_id, id) as guest,
    ):
        await socket.accept()
        start = await socket.first(_START, "start")
        async with guest.start_process(
            checked_command(start.command), stdin=not start.tty, terminal=start.terminal
        ) as stream:
            session = Session(
                socket,
                guest,
                stream,
                TextFrames(),
                _read,
                terminal=start.tty,
                ends_with_client=True,
            )
            await session.run()


@router.get(
    "/{id}/exec/stream",
    operation_id="execStream",
    status_code=101,
    responses=failures(400, 401, 404, 409, 429),
)
async def describe_exec_stream(id: str, team_id: CallerTeam) -> None:
    """A WebSocket: run a command and follow it, as docs/websockets.md says."""
    raise not_a_websocket()


def not_a_websocket() -> InvalidRequest:
    """The answer to an ordinary request for a WebSocket."""
    return InvalidRequest("This route is a WebSocket: connect with Upgrade: websocket")
