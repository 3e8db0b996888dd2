"""`GET /v1/sandboxes/{id}/events`: what happened to a sandbox, and why."""

from fastapi import APIRouter

from wrenn_sandbox.control.api.schemas.events import SandboxEvent
from wrenn_sandbox.control.store.records import Position

from .authentication import CallerTeam
from .paging import Page, PageDependency, bad_cursor
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


def _before(page: Page) -> int | None:
    if page.after is None:
        return None
    if not page.after.key.isdecimal() or len(page.after.key) > 18:
        raise bad_cursor()
    return int(page.after.key)


@router.get(
    "/{id}/events",
    operation_id="listSandboxEvents",
    response_model_exclude_none=True,
    responses=failures(400, 401, 404),
)
async def list_sandbox_events(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    page: PageDependency,
) -> list[SandboxEvent]:
    """The transitions of a sandbox, newest first."""
    found = await services.sandboxes.events(team_id, id, page.one_more, _before(page))
    shown = page.cut(found, lambda last: Position(last.at, str(last.number)))
    return [SandboxEvent.of(event) for event in shown]
