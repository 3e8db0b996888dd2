"""`/v1/usage`: what the caller's team may have, and what it has."""

from typing import Annotated

from fastapi import APIRouter
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


@router.get("", operation_id="getUsage", responses=failures(401))
async def get_usage(team_id: CallerTeam, services: ServicesDependency) -> Usage:
    """The limits of the caller's team and what it uses of them."""
    limits, used = await services.sandboxes.usage(team_id)
    return Usage.of({"limits": limits, "used": used})
