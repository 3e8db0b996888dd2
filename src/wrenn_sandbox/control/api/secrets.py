"""`/v1/secrets`: values that the egress proxy puts into requests, and no guest sees."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter
from pydantic import StringConstraints

from wrenn_sandbox.control.store.records import Position
from wrenn_sandbox.model.secrets import NAME_LENGTH, VALUE_LENGTH

from .authentication import CallerTeam
from .body import JsonBody
from .fields import Argument, RequestModel, ResponseModel
from .paging import PageDependency
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/secrets", tags=["secrets"])

_Value = Annotated[str, StringConstraints(min_length=1, max_length=VALUE_LENGTH)]


class CreateSecretRequest(RequestModel):
    """`value` is printable ASCII on one line: it becomes part of a header."""

    name: Annotated[Argument, StringConstraints(min_length=1, max_length=NAME_LENGTH)]
    value: _Value


class ReplaceSecretRequest(RequestModel):
    """Another value, as in `CreateSecretRequest`."""

    value: _Value


class Secret(ResponseModel):
    """A secret without its value, which no answer has."""

    name: str
    created_at: datetime
    updated_at: datetime


@router.post(
    "",
    operation_id="createSecret",
    status_code=201,
    responses=failures(400, 401, 409, 413, 429),
)
async def create_secret(
    team_id: CallerTeam, services: ServicesDependency, body: JsonBody[CreateSecretRequest]
) -> Secret:
    """Keep a value under a name. Network policies refer to it; nobody is told it again."""
    return Secret.of(await services.secrets.create(team_id, body.name, body.value))


@router.get("", operation_id="listSecrets", responses=failures(400, 401))
async def list_secrets(
    team_id: CallerTeam, services: ServicesDependency, page: PageDependency
) -> list[Secret]:
    """The team's secrets without their values, newest first."""
    found = await services.secrets.page(team_id, page.one_more, page.after)
    shown = page.cut(found, lambda last: Position(last.created_at, last.id))
    return [Secret.of(each) for each in shown]


@router.get("/{name}", operation_id="getSecret", responses=failures(401, 404))
async def get_secret(name: str, team_id: CallerTeam, services: ServicesDependency) -> Secret:
    """One secret without its value."""
    return Secret.of(await services.secrets.get(team_id, name))


@router.put("/{name}", operation_id="replaceSecret", responses=failures(400, 401, 404, 413))
async def replace_secret(
    name: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[ReplaceSecretRequest],
) -> Secret:
    """Give a secret another value; the next requests of running sandboxes have it."""
    return Secret.of(await services.secrets.replace(team_id, name, body.value))


@router.delete(
    "/{name}", operation_id="deleteSecret", status_code=204, responses=failures(401, 404, 409)
)
async def delete_secret(name: str, team_id: CallerTeam, services: ServicesDependency) -> None:
    """Forget a secret. Refused while the network policy of a sandbox refers to it."""
    await services.secrets.delete(team_id, name)
