"""`/v1/sandboxes/{id}/processes`: the commands that run in a sandbox."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.websockets import WebSocket

from wrenn_sandbox.control.api.streams.exec import not_a_websocket, read_attached
from wrenn_sandbox.control.api.streams.frames import Started, TextFrames
from wrenn_sandbox.control.api.streams.session import Session
from wrenn_sandbox.control.api.streams.websocket import Socket
from wrenn_sandbox.control.service.guests import process_of
from wrenn_sandbox.wire.messages import ProcessSignal

from .authentication import CallerTeam
from .fields import NullableText, ResponseModel
from .responses import failures
from .services import ServicesDependency, services_of

router = APIRouter(prefix="/v1/sandboxes/{id}", tags=["sandboxes"])


class Process(ResponseModel):
    pid: int
    tag: NullableText = None
    cmd: str
    args: list[str]


class ProcessList(ResponseModel):
    processes: list[Process]


@router.get(
    "/processes",
    operation_id="listProcesses",
    response_model_exclude_none=True,
    responses=failures(401, 404, 409, 429, 502),
)
async def list_processes(id: str, team_id: CallerTeam, services: ServicesDependency) -> ProcessList:
    """The commands that were started through this API and still run."""
    async with services.guests.using(team_id, id) as guest:
        return ProcessList.of({"processes": await guest.processes()})


@router.delete(
    "/processes/{process}",
    operation_id="signalProcess",
    status_code=204,
    responses=failures(400, 401, 404, 409, 429, 502),
)
async def signal_process(
    id: str,
    process: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    signal: Annotated[ProcessSignal, Query()] = ProcessSignal.KILL,
) -> None:
    """Send a signal to the process group of a command, named by pid or tag."""
    async with services.guests.using(team_id, id) as guest:
        await guest.signal_process(process_of(process), signal)


@router.websocket("/processes/{process}/stream")
async def process_stream(websocket: WebSocket, id: str, process: str) -> None:
    """Follow a running command, from what it said first; it runs on without the client."""
    socket = Socket(websocket)
    async with (
        socket.reporting(),
        socket.authenticated() as team_id,
        services_of(websocket).guests.using(team_id, id) as guest,
        guest.attach_process(process_of(process), replay=True) as stream,
    ):
        await socket.accept()
        socket.begun = True
        await socket.send(Started(stream.pid))
        session = Session(
            socket,
            guest,
            stream,
            TextFrames(),
            read_attached,
            terminal=False,
        )
        await session.run()


@router.get(
    "/processes/{process}/stream",
    operation_id="processStream",
    status_code=101,
    responses=failures(400, 401, 404, 409, 429),
)
async def describe_process_stream(id: str, process: str, team_id: CallerTeam) -> None:
    """A WebSocket: follow a running command, as docs/websockets.md says."""
    raise not_a_websocket()
