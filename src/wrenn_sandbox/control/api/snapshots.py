"""`/v1/snapshots`: templates, the host's and the team's own."""

from datetime import datetime
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field, WithJsonSchema
from starlette.responses import Response

from wrenn_sandbox.control.store.records import Position
from wrenn_sandbox.ids import new_image_id
from wrenn_sandbox.model.template import TemplateType

from .authentication import CallerTeam
from .body import JsonBody
from .fields import NullableInteger, NullableText, RequestModel, ResponseModel
from .idempotency import Once
from .paging import PageDependency
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/snapshots", tags=["snapshots"])


class CreateSnapshotRequest(RequestModel):
    sandbox_id: str
    name: Annotated[str | None, WithJsonSchema({"type": "string"})] = None


class Template(ResponseModel):
    """`sandbox_id` is the sandbox that a snapshot was made of."""

    name: str
    type: Annotated[
        TemplateType,
        WithJsonSchema({"type": "string", "enum": [each.value for each in TemplateType]}),
    ]
    vcpus: NullableInteger = None
    memory_mb: NullableInteger = None
    size_bytes: Annotated[int, Field(json_schema_extra={"format": "int64"})]
    created_at: datetime
    sandbox_id: NullableText = None


@router.post(
    "",
    operation_id="createSnapshot",
    status_code=201,
    response_model=Template,
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def create_snapshot(
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[CreateSnapshotRequest],
    once: Once,
    overwrite: Annotated[Literal["true"] | None, Query()] = None,
) -> Response:
    """Make a template of a running sandbox, which ends with it."""
    create = partial(
        services.snapshots.create,
        team_id,
        sandbox_id=body.sandbox_id,
        name=body.name,
        overwrite=overwrite is not None,
    )
    made = partial(services.snapshots.made, team_id)
    return await once.answer(Template, new_image_id(), create, made)


@router.get(
    "",
    operation_id="listSnapshots",
    response_model_exclude_none=True,
    responses=failures(400, 401),
)
async def list_snapshots(
    team_id: CallerTeam,
    services: ServicesDependency,
    page: PageDependency,
    type: Annotated[Literal["base", "snapshot"] | None, Query()] = None,
) -> list[Template]:
    """Base templates and the team's own, newest first."""
    found = await services.snapshots.page(team_id, None if type is None else TemplateType(type))
    if page.after is not None:
        after = (page.after.at, page.after.key)
        found = [each for each in found if (each.created_at, each.name) < after]
    shown = page.cut(found, lambda last: Position(last.created_at, last.name))
    return [Template.of(each) for each in shown]


@router.delete(
    "/{name}",
    operation_id="deleteSnapshot",
    status_code=204,
    responses=failures(401, 403, 404),
)
async def delete_snapshot(name: str, team_id: CallerTeam, services: ServicesDependency) -> None:
    """Give up a template of the team's; sandboxes made from it keep working."""
    await services.snapshots.delete(team_id, name)
