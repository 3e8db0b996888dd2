"""`GET /v1/sandboxes/{id}/logs`: what a sandbox wrote to its console."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BeforeValidator, Field

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.wire.messages import LogSource

from .authentication import CallerTeam
from .fields import ResponseModel
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes/{id}", tags=["sandboxes"])

_LIMIT = 100
_LIMIT_MAX = 1000
_CURSOR_DIGITS = 18


class Direction(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"


class LogLine(ResponseModel):
    """A line, and when the host read it. `text` is the guest's: any character may be in it.

    `id` serves as a cursor.

    `source` is who seems to have written it: the kernel, Wrenn's guest agent, something else on the
    console, or the host, where lines are missing.
    """

    id: Annotated[str, BeforeValidator(str), Field(validation_alias="number")]
    time: Annotated[datetime, Field(validation_alias="at")]
    source: LogSource
    text: str


class Log(ResponseModel):
    """Lines in the direction that was asked for. The next ones are those from `cursor` on.

    Forward there is always a cursor, for lines to come; backward it is null at the end.
    """

    lines: list[LogLine]
    cursor: str | None


@router.get("/logs", operation_id="getSandboxLogs", responses=failures(400, 401, 404, 429))
async def get_logs(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    direction: Annotated[
        Direction, Query(description="From the oldest line on, or from the newest back")
    ] = Direction.FORWARD,
    limit: Annotated[int, Query(ge=1, le=_LIMIT_MAX)] = _LIMIT,
) -> Log:
    """What the sandbox wrote to its console: kernel, guest agent and others; no activity.

    The last lines are kept within bounds, as long as the sandbox is there and for a day afterwards.
    """
    backward = direction is Direction.BACKWARD
    found = await services.history.log(team_id, id, _number(cursor), backward=backward, limit=limit)
    if found:
        after: str | None = str(found[-1].number)
    else:
        after = None if backward else cursor or "0"
    return Log(lines=[LogLine.of(each) for each in found], cursor=after)


def _number(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    if not (cursor.isascii() and cursor.isdigit()) or len(cursor) > _CURSOR_DIGITS:
        raise InvalidRequest("cursor: take it from an answer")
    return int(cursor)
