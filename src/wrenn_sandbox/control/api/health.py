"""`GET /health`: whether the server answers."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from wrenn_sandbox import __version__

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str = __version__


@router.get("/health", operation_id="health")
async def health() -> Health:
    """Answers as long as the server does; needs no credential."""
    return Health()
