"""`POST /v1/sandboxes/{id}/exec`: one command to its end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field, StringConstraints, WithJsonSchema
from starlette.responses import Response

from wrenn_sandbox.control.service.guests import Encoding, Executed
from wrenn_sandbox.errors import ExecTimeout
from wrenn_sandbox.model.limits import EXEC_TIMEOUT_DEFAULT, EXEC_TIMEOUT_MAX
from wrenn_sandbox.wire.messages import Command

from .authentication import CallerTeam
from .body import JsonBody
from .errors import error_response
from .fields import (
    Argument,
    Environment,
    Integer,
    OptionalArgument,
    RequestModel,
    ResponseModel,
    Tag,
)
from .responses import HeldResponse, failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


class ExecRequest(RequestModel):
    """A command to run directly, without a shell; `timeout_sec` is 1 to 3600."""

    cmd: Annotated[Argument, StringConstraints(min_length=1)]
    args: list[Argument] = Field([])
    timeout_sec: Annotated[Integer, Field(ge=1, le=EXEC_TIMEOUT_MAX)] = EXEC_TIMEOUT_DEFAULT
    envs: Environment = Field({})
    cwd: OptionalArgument = None
    user: OptionalArgument = None
    background: bool = False
    tag: Annotated[Tag | None, WithJsonSchema({"type": "string"})] = None


class ExecResponse(ResponseModel):
    sandbox_id: str
    cmd: str
    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    encoding: Encoding
    truncated: bool


class BackgroundExecResponse(ResponseModel):
    """A command that runs on; `tag` names it as well as `pid` does."""

    sandbox_id: str
    cmd: str
    pid: int
    tag: str


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
        became = (
            "and was killed"
            if executed.killed
            else "and the guest does not respond: whether it was killed is not known"
        )
        return error_response(
            ExecTimeout(
                f"The command did not end within {body.timeout_sec} s {became}",
                stdout=executed.stdout,
                stderr=executed.stderr,
                encoding=executed.encoding,
            )
        )
    answer = ExecResponse.of({"sandbox_id": id, "cmd": body.cmd, **asdict(executed)})
    return Response(answer.model_dump_json(), media_type="application/json")
