"""`/v1/api-keys`: the keys of the caller's team. They need a token."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter
from pydantic import StringConstraints

from wrenn_sandbox.control.store.records import Position

from .authentication import TokenTeam
from .body import JsonBody
from .fields import Argument, NullableText, NullableTime, RequestModel, ResponseModel
from .paging import PageDependency
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/api-keys", tags=["api-keys"])


class CreateAPIKeyRequest(RequestModel):
    name: Annotated[Argument, StringConstraints(max_length=200)] = "Unnamed API Key"


class APIKeyResponse(ResponseModel):
    """`key` is there only in the answer to its creation: it is not kept."""

    id: str
    team_id: str
    name: str
    key_prefix: str
    created_at: datetime
    last_used: NullableTime = None
    key: NullableText = None


@router.post(
    "",
    operation_id="createAPIKey",
    status_code=201,
    response_model_exclude_none=True,
    responses=failures(400, 401, 413, 429),
)
async def create_api_key(
    team_id: TokenTeam,
    services: ServicesDependency,
    body: JsonBody[CreateAPIKeyRequest],
) -> APIKeyResponse:
    """Make a key. The answer is the only place where it is ever shown."""
    record, key = await services.api_keys.create(team_id, body.name)
    return APIKeyResponse.of(record).model_copy(update={"key": key})


@router.get(
    "",
    operation_id="listAPIKeys",
    response_model_exclude_none=True,
    responses=failures(400, 401),
)
async def list_api_keys(
    team_id: TokenTeam,
    services: ServicesDependency,
    page: PageDependency,
) -> list[APIKeyResponse]:
    """The team's keys, newest first."""
    found = await services.api_keys.page(team_id, page.one_more, page.after)
    shown = page.cut(found, lambda last: Position(last.created_at, last.id))
    return [APIKeyResponse.of(key) for key in shown]


@router.delete(
    "/{id}",
    operation_id="deleteAPIKey",
    status_code=204,
    responses=failures(401, 404),
)
async def delete_api_key(id: str, team_id: TokenTeam, services: ServicesDependency) -> None:
    """Delete a key, which stops working at once."""
    await services.api_keys.delete(team_id, id)
