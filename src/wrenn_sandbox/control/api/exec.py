"""`POST /v1/sandboxes/{id}/exec`: one command to its end."""

from typing import Annotated

from fastapi import APIRouter, Depends

from wrenn_sandbox.wire.messages import Command

from .authentication import NEEDS_KEY_OR_TOKEN, CallerTeam
from .body import described, json_body
from .responses import failures
from .schemas import ExecRequest, ExecResponse
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"], dependencies=NEEDS_KEY_OR_TOKEN)


@router.post(
    "/{id}/exec",
    operation_id="execCommand",
    responses=failures(400, 401, 404, 409, 413, 502, 503, 504),
    openapi_extra=described(ExecRequest),
)
async def exec_command(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: Annotated[ExecRequest, Depends(json_body(ExecRequest))],
) -> ExecResponse:
    """Run a command and answer when it has ended, with all that it wrote."""
    command = Command(
        cmd=body.cmd, args=tuple(body.args), envs=body.envs, cwd=body.cwd, user=body.user
    )
    executed = await services.sandboxes.exec(team_id, id, command, body.timeout_sec)
    return ExecResponse.of(id, body.cmd, executed)
