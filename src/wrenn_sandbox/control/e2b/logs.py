"""What sandboxes wrote to their consoles, as E2B's dashboard and command line ask for it.

Their cursors are times in milliseconds; a console has no levels, so all of it is `info`.
"""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Final, Self

from fastapi import APIRouter, Query

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.fields import Argument
from wrenn_sandbox.control.api.logs import Direction
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.services import Services, ServicesDependency
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.wire.messages import LogLine

from .fields import KNOWN_QUERY, E2BResponse

router = APIRouter(tags=["e2b"])
_MOST: Final = 1000
_PAGES: Final = 32
"""Of 1000 lines each: more than are kept."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_LAST_MS: Final = 253_402_300_799_999

Limit = Annotated[int, Query(ge=0, le=_MOST)]
Milliseconds = Annotated[int | None, Query(ge=0, le=_LAST_MS)]


class Level(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class LogEntry(E2BResponse):
    """`fields.source` is who seems to have written the line; see `/v1/sandboxes/{id}/logs`."""

    timestamp: datetime
    message: str
    level: Level = Level.INFO
    fields: dict[str, str]

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, LogLine)
        return cls(timestamp=source.at, message=source.text, fields={"source": source.source})


class OldLogEntry(E2BResponse):
    """`line` is an object in JSON: the command line reads its `level`, `logger` and `message`."""

    timestamp: datetime
    line: str

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, LogLine)
        told = {"level": Level.INFO, "logger": source.source, "message": source.text}
        return cls(timestamp=source.at, line=json.dumps(told))


class Logs(E2BResponse):
    logs: list[LogEntry]


class OldLogs(E2BResponse):
    logs: list[OldLogEntry]
    log_entries: list[LogEntry]


@router.get(
    "/v2/sandboxes/{id}/logs",
    operation_id="e2bGetLogsV2",
    dependencies=[KNOWN_QUERY],
    responses=failures(400, 401, 404, 429),
)
async def get_logs_v2(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    cursor: Milliseconds = None,
    direction: Annotated[Direction, Query()] = Direction.FORWARD,
    level: Annotated[Level, Query()] = Level.DEBUG,
    limit: Limit = _MOST,
    search: Annotated[Argument, Query(max_length=256)] = "",
) -> Logs:
    """Lines from a time on, oldest first; `backward` those until then, newest first."""
    backward = direction is Direction.BACKWARD
    if level in (Level.WARN, Level.ERROR):
        limit = 0
    lines = await _lines(services, team_id, id, cursor, backward=backward, limit=limit, text=search)
    return Logs(logs=[LogEntry.of(each) for each in lines])


@router.get(
    "/sandboxes/{id}/logs",
    operation_id="e2bGetLogs",
    dependencies=[KNOWN_QUERY],
    responses=failures(400, 401, 404, 429),
)
async def get_logs(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    start: Milliseconds = None,
    limit: Limit = _MOST,
) -> OldLogs:
    """Lines from a time on, oldest first."""
    lines = await _lines(services, team_id, id, start, backward=False, limit=limit)
    return OldLogs(
        logs=[OldLogEntry.of(each) for each in lines],
        log_entries=[LogEntry.of(each) for each in lines],
    )


async def _lines(
    services: Services,
    team_id: TeamId,
    id: str,
    cursor: int | None,
    *,
    backward: bool,
    limit: int,
    text: str = "",
) -> list[LogLine]:
    found: list[LogLine] = []
    async for line in _all_lines(services, team_id, id, backward=backward):
        at = (line.at - _EPOCH) // _MILLISECOND
        wanted = cursor is None or (at <= cursor if backward else at >= cursor)
        if len(found) == limit:
            break
        if wanted and text in line.text:
            found.append(line)
    return found


async def _all_lines(
    services: Services, team_id: TeamId, id: str, *, backward: bool
) -> AsyncIterator[LogLine]:
    number: int | None = None
    for _ in range(_PAGES):
        lines = await services.history.log(team_id, id, number, backward=backward, limit=_MOST)
        for line in lines:
            yield line
        if len(lines) < _MOST:
            return
        number = lines[-1].number
