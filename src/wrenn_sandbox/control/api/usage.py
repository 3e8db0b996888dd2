"""`/v1/usage`: what the caller's team may have, and what it has."""

from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, WithJsonSchema

from wrenn_sandbox.model import quota

from .authentication import NEEDS_KEY_OR_TOKEN, CallerTeam
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/usage", tags=["usage"], dependencies=NEEDS_KEY_OR_TOKEN)

Limit = Annotated[int | None, WithJsonSchema({"type": "integer", "nullable": True})]


class Limits(BaseModel):
    """null is no limit."""

    model_config = ConfigDict(frozen=True)

    running: Limit
    vcpus: Limit
    memory_mb: Limit
    sandboxes: Limit
    snapshots: Limit
    disk_bytes: Limit
    api_keys: Limit


class Used(BaseModel):
    """`running`, `vcpus` and `memory_mb` count sandboxes that run or are on their way."""

    model_config = ConfigDict(frozen=True)

    running: int
    vcpus: int
    memory_mb: int
    sandboxes: int
    snapshots: int
    disk_bytes: int
    api_keys: int


class Usage(BaseModel):
    """Memory in MiB; `disk_bytes` as last measured."""

    model_config = ConfigDict(frozen=True)

    limits: Limits
    used: Used

    @classmethod
    def of(cls, limits: quota.Quota, used: quota.Usage) -> Self:
        return cls(
            limits=Limits(
                running=limits.running or None,
                vcpus=limits.vcpus or None,
                memory_mb=limits.memory_mb or None,
                sandboxes=limits.sandboxes or None,
                snapshots=limits.snapshots or None,
                disk_bytes=(limits.disk_mb << 20) or None,
                api_keys=limits.api_keys or None,
            ),
            used=Used(
                running=used.running,
                vcpus=used.vcpus,
                memory_mb=used.memory_mb,
                sandboxes=used.sandboxes,
                snapshots=used.snapshots,
                disk_bytes=used.disk_bytes,
                api_keys=used.api_keys,
            ),
        )


@router.get("", operation_id="getUsage", responses=failures(401))
async def get_usage(team_id: CallerTeam, services: ServicesDependency) -> Usage:
    """The limits of the caller's team and what it uses of them."""
    return Usage.of(*await services.sandboxes.usage(team_id))
