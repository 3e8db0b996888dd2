"""`POST /v1/sandboxes/{id}/exec`: one command to its end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import APIRouter
from starlette.responses import Response

from wrenn_sandbox.control.api.schemas.exec import BackgroundExecResponse, ExecRequest, ExecResponse
from wrenn_sandbox.control.service.guests import Executed
from wrenn_sandbox.errors import ExecTimeout
from wrenn_sandbox.wire.messages import Command

from .authentication import CallerTeam
from .body import JsonBody
from .errors import error_response
from .responses import HeldResponse, failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


@router.post(
    "/{id}/exec",
    operation_id="execCommand",
    response_model=ExecResponse,
    responses={
        202: {"model": BackgroundExecResponse, "description": "It runs in the background"},
        **failures(400, 401, 404, 409, 413, 429, 502, 503, 504),
    },
)
async def exec_command(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[ExecRequest],
) -> Response:
    """Run a command and answer when it has ended, with all that it wrote.

    With `background` the answer comes at once and the command runs on.
    """
    command = Command(
        cmd=body.cmd, args=tuple(body.args), envs=body.envs, cwd=body.cwd, user=body.user
    )
    if body.background:
        async with services.guests.using(team_id, id) as guest:
            started = await services.guests.start_in_background(guest, command, body.tag)
        answer = BackgroundExecResponse(
            sandbox_id=id, cmd=body.cmd, pid=started.pid, tag=started.tag
        )
        return Response(answer.model_dump_json(), 202, media_type="application/json")
    execution = services.guests.exec(team_id, id, command, body.timeout_sec)
    return HeldResponse(_answer(execution, id, body))


@asynccontextmanager
async def _answer(
    execution: AbstractAsyncContextManager[Executed], id: str, body: ExecRequest
) -> AsyncIterator[Response]:
    async with execution as executed:
        yield await asyncio.to_thread(_written, executed, id, body)


def _written(executed: Executed, id: str, body: ExecRequest) -> Response:
    """As JSON: of 20 MiB that is a tenth of a second's work and more."""
    if executed.timed_out:
        output = executed.output
        became = (
            "and was killed"
            if executed.killed
            else "and the guest does not respond: whether it was killed is not known"
        )
        return error_response(
            ExecTimeout(
                f"The command did not end within {body.timeout_sec} s {became}",
                stdout=output.stdout,
                stderr=output.stderr,
                encoding=output.encoding,
            )
        )
    answer = ExecResponse.from_execution(id, body.cmd, executed).model_dump_json()
    return Response(answer, media_type="application/json")
