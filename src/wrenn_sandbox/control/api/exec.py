"""`POST /v1/sandboxes/{id}/exec`: one command to its end."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from wrenn_sandbox.wire.messages import Command

from .authentication import NEEDS_KEY_OR_TOKEN, CallerTeam
from .body import described, json_body
from .responses import failures
from .schemas.exec import BackgroundExecResponse, ExecRequest, ExecResponse
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"], dependencies=NEEDS_KEY_OR_TOKEN)


@router.post(
    "/{id}/exec",
    operation_id="execCommand",
    response_model=ExecResponse,
    responses={
        202: {"model": BackgroundExecResponse, "description": "It runs in the background"},
        **failures(400, 401, 404, 409, 413, 429, 502, 503, 504),
    },
    openapi_extra=described(ExecRequest),
)
async def exec_command(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: Annotated[ExecRequest, Depends(json_body(ExecRequest))],
) -> ExecResponse | Response:
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
    executed = await services.sandboxes.exec(team_id, id, command, body.timeout_sec)
    return ExecResponse.of(id, body.cmd, executed)
