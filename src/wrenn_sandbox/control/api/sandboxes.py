"""`/v1/sandboxes`: the life of the caller's sandboxes."""

from datetime import datetime
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Field, WithJsonSchema

from wrenn_sandbox.control.store.records import Position
from wrenn_sandbox.model.sandbox import Status

from .authentication import CallerTeam
from .body import JsonBody
from .fields import Integer, NullableTime, RequestModel, ResponseModel
from .network import NetworkPolicy
from .paging import PageDependency
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


class CreateSandboxRequest(RequestModel):
    """Memory in MiB; `timeout_sec` of inactivity pauses the sandbox, 0 never does."""

    template: str = "minimal"
    vcpus: Integer = 1
    memory_mb: Integer = 512
    timeout_sec: Integer = 0
    network: NetworkPolicy = NetworkPolicy()


class ResumeSandboxRequest(RequestModel):
    """Without `memory` the sandbox is rebooted: its files are kept, its processes are gone."""

    needed: ClassVar[bool] = False
    memory: bool = True


class Sandbox(ResponseModel):
    id: str
    status: Annotated[
        Status, WithJsonSchema({"type": "string", "enum": [status.value for status in Status]})
    ]
    template: str
    vcpus: int
    memory_mb: int
    timeout_sec: int
    network: NetworkPolicy
    guest_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    host_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    reason: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    created_at: datetime
    started_at: NullableTime = None
    last_active_at: NullableTime = None
    last_updated: datetime
    disk_bytes: Annotated[int, Field(json_schema_extra={"format": "int64"})]


@router.post(
    "",
    operation_id="createSandbox",
    status_code=201,
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def create_sandbox(
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[CreateSandboxRequest],
) -> Sandbox:
    """Start a virtual machine; answers when commands can be run in it."""
    given = body.model_fields_set
    sandbox = await services.sandboxes.create(
        team_id,
        template=body.template if "template" in given else None,
        vcpus=body.vcpus if "vcpus" in given else None,
        memory_mb=body.memory_mb if "memory_mb" in given else None,
        timeout_sec=body.timeout_sec,
        network=body.network.egress(),
    )
    return Sandbox.of(sandbox)


@router.get(
    "",
    operation_id="listSandboxes",
    response_model_exclude_none=True,
    responses=failures(400, 401),
)
async def list_sandboxes(
    team_id: CallerTeam,
    services: ServicesDependency,
    page: PageDependency,
) -> list[Sandbox]:
    """The team's sandboxes, newest first; ended ones for a while too."""
    found = await services.sandboxes.page(team_id, page.one_more, page.after)
    shown = page.cut(found, lambda last: Position(last.created_at, last.id))
    return [Sandbox.of(sandbox) for sandbox in shown]


@router.get(
    "/{id}",
    operation_id="getSandbox",
    response_model_exclude_none=True,
    responses=failures(401, 404),
)
async def get_sandbox(id: str, team_id: CallerTeam, services: ServicesDependency) -> Sandbox:
    """One sandbox as it is now."""
    return Sandbox.of(await services.sandboxes.get(team_id, id))


@router.delete(
    "/{id}",
    operation_id="destroySandbox",
    status_code=204,
    responses=failures(401, 404, 502, 503),
)
async def destroy_sandbox(id: str, team_id: CallerTeam, services: ServicesDependency) -> None:
    """End a sandbox in any state and free all that it has."""
    await services.sandboxes.delete(team_id, id)


@router.post(
    "/{id}/ping",
    operation_id="pingSandbox",
    status_code=204,
    responses=failures(401, 404, 409),
)
async def ping_sandbox(id: str, team_id: CallerTeam, services: ServicesDependency) -> None:
    """Count as activity, so that the sandbox is not paused."""
    await services.guests.ping(team_id, id)


@router.post(
    "/{id}/pause",
    operation_id="pauseSandbox",
    response_model_exclude_none=True,
    responses=failures(401, 404, 409, 502, 503),
)
async def pause_sandbox(id: str, team_id: CallerTeam, services: ServicesDependency) -> Sandbox:
    """Store a running sandbox on disk and free everything else."""
    return Sandbox.of(await services.sandboxes.pause(team_id, id))


@router.post(
    "/{id}/resume",
    operation_id="resumeSandbox",
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def resume_sandbox(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[ResumeSandboxRequest],
) -> Sandbox:
    """Continue a paused sandbox where it was.

    With `"memory": false` it is started from its disk instead, as a machine is after a loss of
    power: its processes are gone. That works where it cannot continue: its guest does not respond,
    or the host's engine is another one by now.
    """
    return Sandbox.of(await services.sandboxes.resume(team_id, id, memory=body.memory))
