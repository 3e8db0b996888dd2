"""`/v1/api-keys`: the keys of the caller's team. They need a token."""

from fastapi import APIRouter

from wrenn_sandbox.control.api.schemas.api_keys import APIKeyResponse, CreateAPIKeyRequest
from wrenn_sandbox.control.store.records import Position

from .authentication import TokenTeam
from .body import JsonBody
from .paging import PageDependency
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/api-keys", tags=["api-keys"])


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
