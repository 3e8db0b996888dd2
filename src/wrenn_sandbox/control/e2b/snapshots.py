"""`/snapshots`, forks, and the end of templates."""

from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.body import JsonBody
from wrenn_sandbox.control.api.fields import Argument, Integer
from wrenn_sandbox.control.api.idempotency import Once
from wrenn_sandbox.control.api.paging import cursor_of, position_of
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.services import ServicesDependency
from wrenn_sandbox.control.store.records import Position, TeamTemplate
from wrenn_sandbox.errors import NotFound, WrennError
from wrenn_sandbox.ids import ImageId, TeamId, new_image_id
from wrenn_sandbox.model.limits import FORKS_MAX
from wrenn_sandbox.model.template import TemplateType

from . import names
from .fields import KNOWN_QUERY, PAGE_MAX, AlwaysTrue, E2BRequest, E2BResponse, Seconds
from .sandboxes import existing, from_now
from .shapes import ForkResult, Reached, ReachedDependency

router = APIRouter(tags=["e2b"])


class NewSnapshot(E2BRequest):
    """A snapshot of this name that is there already is replaced."""

    name: Argument | None = None
    memory: AlwaysTrue = True


class NewForks(E2BRequest):
    count: Annotated[Integer, Field(ge=1, le=FORKS_MAX)] = 1
    timeout: Seconds = 15


@dataclass(frozen=True, slots=True)
class _Owned:
    team_id: TeamId
    template: TeamTemplate


class Snapshot(E2BResponse):
    """`snapshotID` is what a sandbox is made from, as its `templateID`."""

    snapshot_id: str
    names: list[str]

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, _Owned)
        name = source.template.name
        return cls(snapshot_id=name, names=[names.full_name(source.team_id, name)])


@router.post(
    "/sandboxes/{id}/snapshots",
    operation_id="e2bCreateSnapshot",
    status_code=201,
    response_model=Snapshot,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def create_snapshot(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[NewSnapshot],
    once: Once,
) -> Response:
    """Make a snapshot of a sandbox, which goes on."""
    name = None if body.name is None else names.new_template_name(team_id, body.name)

    async def create(image_id: ImageId) -> _Owned:
        sandbox = await existing(services, team_id, id)
        template = await services.snapshots.checkpoint(
            team_id, image_id, sandbox_id=sandbox.id, name=name, overwrite=name is not None
        )
        return _Owned(team_id, template)

    async def made(image_id: ImageId) -> _Owned | None:
        template = await services.snapshots.made(team_id, image_id)
        return None if template is None else _Owned(team_id, template)

    return await once.answer(Snapshot, new_image_id(), create, made)


@router.get(
    "/snapshots",
    operation_id="e2bListSnapshots",
    dependencies=[KNOWN_QUERY],
    responses=failures(400, 401),
)
async def list_snapshots(
    team_id: CallerTeam,
    services: ServicesDependency,
    response: Response,
    sandbox_id: Annotated[str | None, Query(alias="sandboxID")] = None,
    name: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE_MAX,
    next_token: Annotated[str | None, Query(alias="nextToken", max_length=200)] = None,
) -> list[Snapshot]:
    """The team's snapshots, newest first; `x-next-token` says that there are more."""
    wanted = None if name is None else names.template_name(team_id, name)
    after = None if next_token is None else position_of(next_token)
    found = [
        each
        for each in await services.snapshots.page(team_id, TemplateType.SNAPSHOT)
        if isinstance(each, TeamTemplate)
        and (wanted is None or each.name == wanted)
        and (sandbox_id is None or each.sandbox_id == sandbox_id)
        and (after is None or (each.created_at, each.name) < (after.at, after.key))
    ]
    shown = found[:limit]
    if len(found) > limit:
        response.headers["x-next-token"] = cursor_of(Position(shown[-1].created_at, shown[-1].name))
    return [Snapshot.of(_Owned(team_id, each)) for each in shown]


@router.post(
    "/sandboxes/{id}/fork",
    operation_id="e2bFork",
    status_code=201,
    response_model=list[ForkResult],
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 409, 413, 429, 502, 503),
)
async def fork(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[NewForks],
    once: Once,
    reached: ReachedDependency,
) -> Response:
    """Make sandboxes that go on from where this one is; `sandbox` or `error` for each."""

    async def make(image_id: ImageId) -> list[Reached | WrennError]:
        sandbox = await existing(services, team_id, id)
        forks = await services.sandboxes.fork(
            team_id,
            image_id,
            sandbox_id=sandbox.id,
            count=body.count,
            deadline_sec=from_now(body.timeout),
        )
        return [
            each if isinstance(each, WrennError) else reached.without_tokens(each) for each in forks
        ]

    async def made(image_id: ImageId) -> list[Reached] | None:
        forks = await services.sandboxes.forks_made(team_id, image_id)
        return None if forks is None else [reached.without_tokens(each) for each in forks]

    return await once.answer(
        ForkResult, new_image_id(), make, made, complete=reached.complete_forks
    )


@router.delete(
    "/templates/{id:path}",
    operation_id="e2bDeleteTemplate",
    status_code=204,
    responses=failures(401, 403, 404),
)
async def delete_template(
    id: str, request: Request, team_id: CallerTeam, services: ServicesDependency
) -> None:
    """Give up a snapshot, by its id or one of its names."""
    if request.scope["path"] != f"/templates/{id}":  # a line feed at the end is no part of `id`
        raise NotFound("There is no such template")
    await services.snapshots.delete(team_id, names.template_name(team_id, id))
