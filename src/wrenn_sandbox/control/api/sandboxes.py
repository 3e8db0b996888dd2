"""`/v1/sandboxes`: the life of the caller's sandboxes."""

from datetime import datetime
from functools import partial
from typing import Annotated, ClassVar, Final

from fastapi import APIRouter, Depends, Query
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from wrenn_sandbox.control.store.records import Position, SandboxFilter, SandboxUpdate
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.ids import new_sandbox_id
from wrenn_sandbox.model.limits import LABELS_MAX
from wrenn_sandbox.model.sandbox import OnDeadline, Status

from .authentication import CallerTeam
from .body import JsonBody
from .fields import (
    Argument,
    DefaultEnvironment,
    Integer,
    Metadata,
    NullableTime,
    RequestModel,
    ResponseModel,
)
from .idempotency import Once
from .network import NetworkPolicy
from .paging import PageDependency
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])
_PREFIX: Final = "metadata."
_INTEGER: Final = WithJsonSchema({"type": "integer"})
_BOOLEAN: Final = WithJsonSchema({"type": "boolean"})
_ON_DEADLINE: Final = WithJsonSchema(
    {"type": "string", "enum": [each.value for each in OnDeadline]}
)
_LABELS_SCHEMA: Final = {"type": "object", "additionalProperties": {"type": "string"}}


async def _filter(
    request: Request,
    status: Annotated[list[Status], Query()] = [],  # noqa: B006 - FastAPI copies it
    template: Annotated[Argument | None, Query()] = None,
) -> SandboxFilter:
    labels = [
        (name.removeprefix(_PREFIX), value)
        for name, value in request.query_params.multi_items()
        if name.startswith(_PREFIX)
    ]
    if len(labels) > LABELS_MAX:
        raise InvalidRequest(f"metadata: no more than {LABELS_MAX} labels can be asked for")
    if any("\0" in text for label in labels for text in label):
        raise InvalidRequest("metadata: must not contain a NUL character")
    return SandboxFilter(statuses=status, template=template, labels=labels)


FilterDependency = Annotated[SandboxFilter, Depends(_filter)]


class CreateSandboxRequest(RequestModel):
    """Memory in MiB; a size that is not given is the template's.

    After `timeout_sec` of inactivity the sandbox is paused; 0 is never.

    `deadline_sec` from now it is paused or deleted whatever it does, as `on_deadline` says; 0 is no
    deadline.

    With `auto_resume` a request to one of its ports resumes it. With `private_ports` such a request
    needs the sandbox's token.

    `metadata` holds labels, by which the list finds it. Every command in it has `envs` in its
    environment, and goes before them with its own; no answer shows them.
    """

    template: str = "minimal"
    vcpus: Integer = 1
    memory_mb: Integer = 512
    timeout_sec: Integer = 0
    deadline_sec: Integer = 0
    on_deadline: Annotated[OnDeadline, _ON_DEADLINE] = OnDeadline.PAUSE
    auto_resume: bool = False
    private_ports: bool = False
    network: NetworkPolicy = NetworkPolicy()
    metadata: Metadata = Field({})
    envs: DefaultEnvironment = Field({})


class UpdateSandboxRequest(RequestModel):
    """What is left out or null stays; `metadata` replaces all labels.

    `deadline_sec` counts from now, and 0 takes the deadline away.
    """

    needed: ClassVar[bool] = False
    metadata: Annotated[Metadata | None, WithJsonSchema(_LABELS_SCHEMA)] = None
    timeout_sec: Annotated[Integer | None, _INTEGER] = None
    deadline_sec: Annotated[Integer | None, _INTEGER] = None
    on_deadline: Annotated[OnDeadline | None, _ON_DEADLINE] = None
    auto_resume: Annotated[bool | None, _BOOLEAN] = None
    private_ports: Annotated[bool | None, _BOOLEAN] = None


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
    metadata: dict[str, str]
    deadline_at: NullableTime = None
    on_deadline: Annotated[OnDeadline, _ON_DEADLINE]
    auto_resume: bool
    private_ports: bool
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
    response_model=Sandbox,
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def create_sandbox(
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[CreateSandboxRequest],
    once: Once,
) -> Response:
    """Start a virtual machine; answers when commands can be run in it."""
    given = body.model_fields_set
    create = partial(
        services.sandboxes.create,
        team_id,
        template=body.template if "template" in given else None,
        vcpus=body.vcpus if "vcpus" in given else None,
        memory_mb=body.memory_mb if "memory_mb" in given else None,
        timeout_sec=body.timeout_sec,
        deadline_sec=body.deadline_sec,
        on_deadline=body.on_deadline,
        auto_resume=body.auto_resume,
        private_ports=body.private_ports,
        network=body.network.egress(),
        metadata=body.metadata,
        envs=body.envs,
    )
    made = partial(services.sandboxes.made, team_id)
    return await once.answer(Sandbox, new_sandbox_id(), create, made)


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
    wanted: FilterDependency,
) -> list[Sandbox]:
    """The team's sandboxes, newest first; ended ones for a while too.

    `status` may be repeated: any of them is shown. So may `metadata.KEY=VALUE`, which takes those
    with that label: all of them have to match.
    """
    found = await services.sandboxes.page(team_id, wanted, page.one_more, page.after)
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


@router.patch(
    "/{id}",
    operation_id="updateSandbox",
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413),
)
async def update_sandbox(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[UpdateSandboxRequest],
) -> Sandbox:
    """Change labels, timers and the use of ports of a sandbox that has not ended."""
    changed = SandboxUpdate(
        metadata=body.metadata,
        timeout_sec=body.timeout_sec,
        deadline_sec=body.deadline_sec,
        on_deadline=body.on_deadline,
        auto_resume=body.auto_resume,
        private_ports=body.private_ports,
    )
    return Sandbox.of(await services.sandboxes.update(team_id, id, changed))


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
