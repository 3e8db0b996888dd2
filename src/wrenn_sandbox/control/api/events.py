"""`GET /v1/sandboxes/{id}/events`: what happened to a sandbox, and why."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field, WithJsonSchema

from wrenn_sandbox.control.store.records import Position

from .authentication import CallerTeam
from .fields import NullableText, ResponseModel
from .paging import Page, PageDependency, bad_cursor
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


class SandboxEvent(ResponseModel):
    """One transition of a sandbox. `from` is absent for its creation."""

    event: str
    from_state: Annotated[
        str | None,
        Field(serialization_alias="from"),
        WithJsonSchema({"type": "string", "nullable": True}),
    ] = None
    to_state: Annotated[str, Field(serialization_alias="to")]
    reason: NullableText = None
    actor: str
    time: Annotated[datetime, Field(validation_alias="at")]


def before_number(page: Page) -> int | None:
    """The number that the cursor of a list of numbered things names."""
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
    found = await services.sandboxes.events(team_id, id, page.one_more, before_number(page))
    shown = page.cut(found, lambda last: Position(last.at, str(last.number)))
    return [SandboxEvent.of(event) for event in shown]
