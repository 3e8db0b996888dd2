"""`/v1/usage`: what the caller's team may have, what it has, and what it has used."""

from datetime import date, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BeforeValidator, WithJsonSchema

from wrenn_sandbox.control.api.fields import ResponseModel

from .authentication import CallerTeam
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/usage", tags=["usage"])

Limit = Annotated[
    int | None,
    BeforeValidator(lambda limit: limit or None),
    WithJsonSchema({"type": "integer", "nullable": True}),
]


class Limits(ResponseModel):
    """null is no limit."""

    running: Limit
    vcpus: Limit
    memory_mb: Limit
    sandboxes: Limit
    snapshots: Limit
    disk_bytes: Limit
    api_keys: Limit


class Used(ResponseModel):
    """`running`, `vcpus` and `memory_mb` count sandboxes that run or are on their way."""

    running: int
    vcpus: int
    memory_mb: int
    sandboxes: int
    snapshots: int
    disk_bytes: int
    api_keys: int


class Usage(ResponseModel):
    """Memory in MiB; `disk_bytes` as last measured."""

    limits: Limits
    used: Used


class DayUsage(ResponseModel):
    """What the sandboxes of a team used on one day (UTC); memory in MiB."""

    date: date
    running_sec: float
    vcpu_sec: float
    memory_mb_sec: float


class UsageHistory(ResponseModel):
    """Every day that was asked for, in order. What runs counts until `until`."""

    until: datetime
    days: list[DayUsage]


@router.get("", operation_id="getUsage", responses=failures(401))
async def get_usage(team_id: CallerTeam, services: ServicesDependency) -> Usage:
    """The limits of the caller's team and what it uses of them."""
    limits, used = await services.sandboxes.usage(team_id)
    return Usage.of({"limits": limits, "used": used})


@router.get("/history", operation_id="getUsageHistory", responses=failures(400, 401))
async def get_usage_history(
    team_id: CallerTeam,
    services: ServicesDependency,
    first: Annotated[
        date | None, Query(alias="from", description="First day; by default 30 days in all")
    ] = None,
    last: Annotated[
        date | None, Query(alias="to", description="Last day; by default today (UTC)")
    ] = None,
) -> UsageHistory:
    """How long the team's sandboxes ran on each day, deleted ones too; at most 366 days."""
    until, days = await services.sandboxes.usage_history(team_id, first, last)
    return UsageHistory(
        until=until,
        days=[
            DayUsage(
                date=each.day,
                running_sec=each.running_us / 1_000_000,
                vcpu_sec=each.vcpu_us / 1_000_000,
                memory_mb_sec=each.memory_mb_us / 1_000_000,
            )
            for each in days
        ],
    )
