"""`/v1/capsules`: what Wrenn's own client calls `/v1/sandboxes`, and three reports of its own."""

import re
from datetime import date
from enum import StrEnum
from typing import Annotated, Final

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from .authentication import CallerTeam
from .fields import ResponseModel
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/capsules", tags=["capsules"])
_THEIRS: Final = "/v1/capsules"
_OURS: Final = "/v1/sandboxes"
_REPORTS: Final = re.compile(f"{_THEIRS}/(stats|usage|[^/]+/metrics)")


class Capsules:
    """Gives requests for capsules the path of sandboxes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            path = str(scope["path"])
            if f"{path}/".startswith(f"{_THEIRS}/") and not _REPORTS.fullmatch(path):
                scope["path"] = _OURS + path.removeprefix(_THEIRS)
        await self._app(scope, receive, send)


class Range(StrEnum):
    """A time until now."""

    MINUTES_5 = "5m"
    MINUTES_10 = "10m"
    HOUR = "1h"
    HOURS_2 = "2h"
    HOURS_6 = "6h"
    HOURS_12 = "12h"
    DAY = "24h"
    DAYS_30 = "30d"

    @property
    def seconds(self) -> int:
        return int(self[:-1]) * {"m": 60, "h": 3600, "d": 86400}[self[-1]]


class Reserved(ResponseModel):
    running_count: int
    vcpus_reserved: int
    memory_mb_reserved: int


class Stats(ResponseModel):
    """What runs now; of what ran before only the days are known: see `/v1/usage/history`."""

    range: Range
    current: Reserved


class UsagePoint(ResponseModel):
    date: date
    cpu_minutes: float
    ram_mb_minutes: float


class UsageOfDays(ResponseModel):
    first: Annotated[date, Field(serialization_alias="from")]
    to: date
    points: list[UsagePoint]


class MetricPoint(ResponseModel):
    timestamp_unix: int
    cpu_pct: float
    mem_bytes: int | None
    disk_bytes: int | None


class CapsuleMetrics(ResponseModel):
    sandbox_id: str
    range: Range
    points: list[MetricPoint]


@router.get("/stats", operation_id="getCapsuleStats", responses=failures(400, 401))
async def get_stats(
    team_id: CallerTeam,
    services: ServicesDependency,
    range: Annotated[Range, Query()] = Range.HOUR,
) -> Stats:
    """How many capsules of the team run, and what they take."""
    _, used = await services.sandboxes.usage(team_id)
    current = Reserved(
        running_count=used.running,
        vcpus_reserved=used.vcpus,
        memory_mb_reserved=used.memory_mb,
    )
    return Stats(range=range, current=current)


@router.get("/usage", operation_id="getCapsuleUsage", responses=failures(400, 401))
async def get_usage(
    team_id: CallerTeam,
    services: ServicesDependency,
    first: Annotated[date | None, Query(alias="from")] = None,
    last: Annotated[date | None, Query(alias="to")] = None,
) -> UsageOfDays:
    """What the team's capsules used on each day (UTC)."""
    _, days = await services.sandboxes.usage_history(team_id, first, last)
    points = [
        UsagePoint(
            date=each.day,
            cpu_minutes=each.vcpu_us / 60_000_000,
            ram_mb_minutes=each.memory_mb_us / 60_000_000,
        )
        for each in days
    ]
    return UsageOfDays(first=points[0].date, to=points[-1].date, points=points)


@router.get(
    "/{id}/metrics", operation_id="getCapsuleMetrics", responses=failures(400, 401, 404, 429)
)
async def get_metrics(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    range: Annotated[Range, Query()] = Range.MINUTES_10,
) -> CapsuleMetrics:
    """What a capsule used until now."""
    found = await services.history.recent(team_id, id, range.seconds)
    points = [
        MetricPoint(
            timestamp_unix=each.time,
            cpu_pct=each.cpu_used_pct,
            mem_bytes=each.mem_used,
            disk_bytes=each.disk_used,
        )
        for each in found.samples
    ]
    return CapsuleMetrics(sandbox_id=id, range=range, points=points)
