"""`/v1/sandboxes/{id}/snapshots`, `fork` and `rollback`: copies of a sandbox, and the way back."""

from functools import partial
from typing import Annotated, ClassVar, Literal, Self

from fastapi import APIRouter, Query
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.ids import new_image_id
from wrenn_sandbox.model.limits import FORKS_MAX

from .authentication import CallerTeam
from .body import JsonBody
from .errors import content_of
from .fields import Integer, RequestModel, ResponseModel
from .idempotency import Once
from .network import NetworkPolicy
from .responses import ErrorDetail, failures
from .sandboxes import Sandbox
from .services import ServicesDependency
from .snapshots import Template

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


class CheckpointRequest(RequestModel):
    needed: ClassVar[bool] = False
    name: Annotated[str | None, WithJsonSchema({"type": "string"})] = None


class ForkRequest(RequestModel):
    """`count` is 1 to 20. The other fields are as in the sandbox where they are left out."""

    needed: ClassVar[bool] = False
    count: Annotated[Integer, Field(ge=1, le=FORKS_MAX)] = 1
    timeout_sec: Annotated[Integer | None, WithJsonSchema({"type": "integer"})] = None
    network: NetworkPolicy | None = None


class RollbackRequest(RequestModel):
    snapshot: str


class Fork(ResponseModel):
    """A new sandbox, or why it could not be made."""

    sandbox: Sandbox | None = None
    error: ErrorDetail | None = None

    @classmethod
    def of(cls, source: object) -> Self:
        if isinstance(source, WrennError):
            return cls(error=ErrorDetail.model_validate(content_of(source)))
        return cls(sandbox=Sandbox.of(source))


@router.post(
    "/{id}/snapshots",
    operation_id="createSandboxSnapshot",
    status_code=201,
    response_model=Template,
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def create_sandbox_snapshot(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[CheckpointRequest],
    once: Once,
    overwrite: Annotated[Literal["true"] | None, Query()] = None,
) -> Response:
    """Make a template of a running or paused sandbox, which stays as it is."""
    create = partial(
        services.snapshots.checkpoint,
        team_id,
        sandbox_id=id,
        name=body.name,
        overwrite=overwrite is not None,
    )
    made = partial(services.snapshots.made, team_id)
    return await once.answer(Template, new_image_id(), create, made)


@router.post(
    "/{id}/fork",
    operation_id="forkSandbox",
    status_code=201,
    response_model=list[Fork],
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def fork_sandbox(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[ForkRequest],
    once: Once,
) -> Response:
    """Make sandboxes that go on from where a running or paused one is; it stays as it is.

    Each has its own id, network address, host name and random numbers. The answer has `sandbox` or
    `error` for each, in order: some may be made where others find no room.
    """
    fork = partial(
        services.sandboxes.fork,
        team_id,
        sandbox_id=id,
        count=body.count,
        timeout_sec=body.timeout_sec,
        network=None if body.network is None else body.network.egress(),
    )
    made = partial(services.sandboxes.forks_made, team_id)
    return await once.answer(Fork, new_image_id(), fork, made)


@router.post(
    "/{id}/rollback",
    operation_id="rollbackSandbox",
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def rollback_sandbox(
    id: str, team_id: CallerTeam, services: ServicesDependency, body: JsonBody[RollbackRequest]
) -> Sandbox:
    """Let a running or paused sandbox go on from a snapshot that was made of it.

    What it was until then is gone, its open connections too; afterwards it runs.
    """
    return Sandbox.of(await services.sandboxes.roll_back(team_id, id, body.snapshot))
