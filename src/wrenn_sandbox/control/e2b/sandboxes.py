"""`/sandboxes` and `/v2/sandboxes`: the life of sandboxes, as both generations of clients ask."""

from typing import Annotated, Final, Literal
from urllib.parse import parse_qsl, unquote

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, Field
from starlette.responses import Response

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.body import JsonBody
from wrenn_sandbox.control.api.fields import Argument, DefaultEnvironment, Metadata
from wrenn_sandbox.control.api.idempotency import Once
from wrenn_sandbox.control.api.paging import cursor_of, position_of
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.services import Services, ServicesDependency
from wrenn_sandbox.control.service.lifecycle import not_possible
from wrenn_sandbox.control.store.records import Position, Sandbox, SandboxFilter, SandboxUpdate
from wrenn_sandbox.errors import AgentError, InvalidRequest, InvalidState, NoCapacity, NotFound
from wrenn_sandbox.ids import SandboxId, TeamId, new_sandbox_id
from wrenn_sandbox.model.limits import LABELS_MAX
from wrenn_sandbox.model.sandbox import OnDeadline, State, Status

from . import names
from .fields import KNOWN_QUERY, PAGE_MAX, AlwaysTrue, E2BRequest, Seconds, Unsupported
from .network import NewNetwork
from .shapes import Detail, Listed, Reach, Reached, ReachedDependency, SandboxState, Started

router = APIRouter(tags=["e2b"])
_EXISTING: Final = (Status.RUNNING, Status.PAUSED)
_LIFE: Final = failures(400, 401, 404, 409, 413, 429, 502, 503)


class AutoResume(E2BRequest):
    """Whether requests to its ports resume a sandbox that its timeout has paused."""

    enabled: bool = False


class NewSandboxV2(E2BRequest):
    """`timeout` seconds from now a sandbox is deleted, or paused with `autoPause`."""

    template_id: Argument = names.BASE
    timeout: Seconds = 300
    auto_pause: bool = False
    auto_pause_memory: AlwaysTrue = True
    auto_resume: AutoResume | None = None
    secure: bool = True
    allow_internet_access: Annotated[bool | None, Field(alias="allow_internet_access")] = None
    network: NewNetwork | None = None
    metadata: Metadata | None = None
    env_vars: DefaultEnvironment | None = None
    mcp: Unsupported = None
    iam: Unsupported = None
    volume_mounts: Unsupported = None


class NewSandbox(NewSandboxV2):
    timeout: Seconds = 15


class ConnectV2(E2BRequest):
    """Without `memory` a paused sandbox is started from its disk: its processes are gone."""

    timeout: Seconds = 300
    memory: bool = True


class Connect(ConnectV2):
    timeout: Seconds


class Resume(ConnectV2):
    timeout: Seconds = 15
    auto_pause: bool | None = None


class Timeout(E2BRequest):
    timeout: Seconds


class Refresh(E2BRequest):
    duration: Seconds = 15


class Pause(E2BRequest):
    memory: AlwaysTrue = True
    require_healthy_guest: bool = False


async def existing(services: Services, team_id: TeamId, id: str) -> Sandbox:
    """A sandbox that runs or is paused; for E2B's clients there are no others."""
    sandbox = await services.sandboxes.settled(team_id, id)
    if sandbox.status not in _EXISTING:
        raise NotFound("There is no such sandbox")
    return sandbox


def from_now(timeout: int) -> int:
    """The deadline of a timeout: 0 is at once for E2B, and never for us."""
    return max(timeout, 1)


def _on_deadline(auto_pause: bool) -> OnDeadline:
    return OnDeadline.PAUSE if auto_pause else OnDeadline.DELETE


@router.post(
    "/v2/sandboxes",
    operation_id="e2bCreateSandboxV2",
    status_code=201,
    response_model=Started,
    responses=_LIFE,
)
async def create_v2(
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[NewSandboxV2],
    once: Once,
    reached: ReachedDependency,
) -> Response:
    """Start a sandbox of a template, with the template's size."""
    return await _create(team_id, services, body, once, reached)


@router.post(
    "/sandboxes",
    operation_id="e2bCreateSandbox",
    status_code=201,
    response_model=Started,
    responses=_LIFE,
)
async def create(
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[NewSandbox],
    once: Once,
    reached: ReachedDependency,
) -> Response:
    """The same for older clients."""
    return await _create(team_id, services, body, once, reached)


async def _create(
    team_id: TeamId, services: Services, body: NewSandboxV2, once: Once, reached: Reach
) -> Response:
    auto_resume = body.auto_resume is not None and body.auto_resume.enabled
    if auto_resume and not body.auto_pause:
        raise InvalidRequest("autoResume.enabled: true needs autoPause")
    name = names.template_name(team_id, body.template_id)
    network = body.network or NewNetwork()

    async def create(id: SandboxId) -> Reached:
        try:
            template = await services.snapshots.named(team_id, name)
        except NotFound as error:
            raise names.missing(name) from error
        sandbox = await services.sandboxes.create(
            team_id,
            id,
            template=template.name,
            vcpus=None,
            memory_mb=None,
            timeout_sec=0,
            deadline_sec=from_now(body.timeout),
            on_deadline=_on_deadline(body.auto_pause),
            auto_resume=auto_resume,
            private_ports=network.allow_public_traffic is False,
            network=network.egress(body.allow_internet_access),
            metadata=body.metadata or {},
            envs=body.env_vars or {},
        )
        return reached.without_tokens(sandbox)

    async def made(id: SandboxId) -> Reached | None:
        sandbox = await services.sandboxes.made(team_id, id)
        return None if sandbox is None else reached.without_tokens(sandbox)

    return await once.answer(Started, new_sandbox_id(), create, made, complete=reached.complete)


def _states(texts: list[str]) -> list[Status]:
    try:
        wanted = [SandboxState(each) for text in texts for each in text.split(",")]
    except ValueError:
        raise InvalidRequest("state: must be running, paused, or both with a comma") from None
    return [Status(each) for each in wanted] or list(_EXISTING)


def _labels(text: str) -> list[tuple[str, str]]:
    """The labels of a filter: a query string whose keys and values are encoded once more."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=LABELS_MAX, errors="strict")
        labels = [
            (unquote(key, errors="strict"), unquote(each, errors="strict")) for key, each in pairs
        ]
    except ValueError as error:
        raise InvalidRequest(
            f"metadata: must be up to {LABELS_MAX} labels as a query string in UTF-8"
        ) from error
    if any("\0" in each for label in labels for each in label):
        raise InvalidRequest("metadata: must not contain a NUL character")
    return labels


_Metadata = Annotated[Argument, Query()]


@router.get(
    "/v2/sandboxes",
    operation_id="e2bListSandboxesV2",
    dependencies=[KNOWN_QUERY],
    responses=failures(400, 401),
)
async def list_v2(
    team_id: CallerTeam,
    services: ServicesDependency,
    response: Response,
    metadata: _Metadata = "",
    state: Annotated[list[str], Query()] = [],  # noqa: B006 - FastAPI copies it
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE_MAX,
    next_token: Annotated[str | None, Query(alias="nextToken", max_length=200)] = None,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    started_after: Annotated[AwareDatetime | None, Query(alias="startedAfter")] = None,
    template: Annotated[Argument | None, Query()] = None,
) -> list[Listed]:
    """The sandboxes that run or are paused; `x-next-token` says that there are more."""
    wanted = SandboxFilter(
        statuses=_states(state),
        template=None if template is None else names.template_name(team_id, template),
        labels=_labels(metadata),
        created_after=started_after,
        oldest_first=order == "asc",
    )
    after = None if next_token is None else position_of(next_token)
    found = await services.sandboxes.page(team_id, wanted, limit + 1, after)
    shown = found[:limit]
    if len(found) > limit:
        response.headers["x-next-token"] = cursor_of(Position(shown[-1].created_at, shown[-1].id))
    return [Listed.of(each) for each in shown]


@router.get(
    "/sandboxes",
    operation_id="e2bListSandboxes",
    dependencies=[KNOWN_QUERY],
    responses=failures(400, 401),
)
async def list_running(
    team_id: CallerTeam, services: ServicesDependency, metadata: _Metadata = ""
) -> list[Listed]:
    """The sandboxes that run."""
    wanted = SandboxFilter(statuses=[Status.RUNNING], labels=_labels(metadata))
    return [Listed.of(each) for each in await services.sandboxes.page(team_id, wanted, None, None)]


@router.get("/sandboxes/{id}", operation_id="e2bGetSandbox", responses=failures(401, 404))
async def get(
    id: str, team_id: CallerTeam, services: ServicesDependency, reached: ReachedDependency
) -> Detail:
    """One sandbox that runs or is paused."""
    return Detail.of(reached(await existing(services, team_id, id)))


@router.delete(
    "/sandboxes/{id}",
    operation_id="e2bDeleteSandbox",
    status_code=204,
    responses=failures(401, 404, 502, 503),
)
async def delete(id: str, team_id: CallerTeam, services: ServicesDependency) -> None:
    """End a sandbox; 404 for one that has ended."""
    sandbox = await services.sandboxes.get(team_id, id)
    if sandbox.state is State.STOPPED:
        raise NotFound("There is no such sandbox")
    await services.sandboxes.delete(team_id, sandbox.id)


@router.post(
    "/v2/sandboxes/{id}/connect",
    operation_id="e2bConnectV2",
    response_model_exclude_none=True,
    responses={**_LIFE, 201: {"model": Started, "description": "It was paused and runs again"}},
)
async def connect_v2(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[ConnectV2],
    response: Response,
    reached: ReachedDependency,
) -> Started:
    """Use a sandbox, which is resumed where it is paused; its deadline only moves away."""
    return Started.of(reached(await _connect(id, team_id, services, body, response)))


@router.post(
    "/sandboxes/{id}/connect",
    operation_id="e2bConnect",
    response_model_exclude_none=True,
    responses={**_LIFE, 201: {"model": Started, "description": "It was paused and runs again"}},
)
async def connect(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[Connect],
    response: Response,
    reached: ReachedDependency,
) -> Started:
    """The same for older clients."""
    return Started.of(reached(await _connect(id, team_id, services, body, response)))


async def _connect(
    id: str, team_id: TeamId, services: Services, body: ConnectV2, response: Response
) -> Sandbox:
    try:
        return await _connected(id, team_id, services, body, response)
    except InvalidState:  # somebody else resumed or paused it meanwhile
        return await _connected(id, team_id, services, body, response)


async def _connected(
    id: str, team_id: TeamId, services: Services, body: ConnectV2, response: Response
) -> Sandbox:
    sandbox = await existing(services, team_id, id)
    seconds = from_now(body.timeout)
    if sandbox.status is Status.PAUSED:
        resumed = await services.sandboxes.resume(
            team_id, sandbox.id, memory=body.memory, deadline_sec=seconds
        )
        response.status_code = 201
        return resumed
    longer = SandboxUpdate(deadline_at_least_sec=seconds)
    updated = await services.sandboxes.update(team_id, sandbox.id, longer)
    if updated.state in (State.PAUSING, State.PAUSED):
        raise not_possible(updated.state, "connect to it again")
    return updated


@router.post(
    "/sandboxes/{id}/resume",
    operation_id="e2bResume",
    response_model_exclude_none=True,
    status_code=201,
    responses=_LIFE,
)
async def resume(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[Resume],
    reached: ReachedDependency,
) -> Started:
    """Continue a paused sandbox."""
    sandbox = await existing(services, team_id, id)
    if body.auto_pause is not None and sandbox.status is Status.PAUSED:
        changed = SandboxUpdate(on_deadline=_on_deadline(body.auto_pause))
        await services.sandboxes.update(team_id, sandbox.id, changed)
    resumed = await services.sandboxes.resume(
        team_id, sandbox.id, memory=body.memory, deadline_sec=from_now(body.timeout)
    )
    return Started.of(reached(resumed))


@router.post(
    "/sandboxes/{id}/timeout",
    operation_id="e2bSetTimeout",
    status_code=204,
    responses=failures(400, 401, 404, 413),
)
async def set_timeout(
    id: str, team_id: CallerTeam, services: ServicesDependency, body: JsonBody[Timeout]
) -> None:
    """Let a running sandbox end so many seconds from now, sooner or later than until now."""
    sandbox = await _running(services, team_id, id)
    changed = SandboxUpdate(deadline_sec=from_now(body.timeout))
    await services.sandboxes.update(team_id, sandbox.id, changed)


@router.post(
    "/sandboxes/{id}/refreshes",
    operation_id="e2bRefresh",
    status_code=204,
    responses=failures(400, 401, 404, 413),
)
async def refresh(
    id: str, team_id: CallerTeam, services: ServicesDependency, body: JsonBody[Refresh]
) -> None:
    """Let a running sandbox last for so many seconds from now at least."""
    sandbox = await _running(services, team_id, id)
    changed = SandboxUpdate(deadline_at_least_sec=from_now(body.duration))
    await services.sandboxes.update(team_id, sandbox.id, changed)


async def _running(services: Services, team_id: TeamId, id: str) -> Sandbox:
    """A sandbox that runs: one that is paused has no timeout."""
    sandbox = await existing(services, team_id, id)
    if sandbox.status is not Status.RUNNING:
        raise NotFound("The sandbox is paused; only one that runs has a timeout")
    return sandbox


@router.post(
    "/sandboxes/{id}/pause",
    operation_id="e2bPause",
    status_code=204,
    responses=failures(400, 401, 404, 409, 413, 502, 503),
)
async def pause(
    id: str, team_id: CallerTeam, services: ServicesDependency, body: JsonBody[Pause]
) -> None:
    """Store a running sandbox. It is kept until it is deleted, whatever its timeout was."""
    sandbox = await existing(services, team_id, id)
    if body.require_healthy_guest and sandbox.status is Status.RUNNING:
        try:
            await services.guests.metrics(team_id, sandbox.id)
        except AgentError as error:
            raise NoCapacity(error.message, detail=error.detail) from error
    deleted = sandbox.on_deadline is OnDeadline.DELETE
    await services.sandboxes.pause(team_id, sandbox.id, deadline_sec=0 if deleted else None)
