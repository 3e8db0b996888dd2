"""`GET /health`: whether the server answers."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from wrenn_sandbox import __version__

from .services import ServicesDependency

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str = __version__
    draining: bool = False
    """Whether new sandboxes are refused, because the machine is to be serviced."""


@router.get("/health", operation_id="health")
async def health(services: ServicesDependency) -> Health:
    """Answers as long as the server does; needs no credential."""
    return Health(draining=services.draining.since is not None)
