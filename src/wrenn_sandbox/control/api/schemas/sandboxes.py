"""Sandboxes: `/v1/sandboxes`."""

from datetime import datetime
from typing import Annotated, ClassVar

from pydantic import Field, WithJsonSchema

from wrenn_sandbox.model.sandbox import Status

from .fields import Integer, NullableTime, Request, Response
from .network import NetworkPolicy


class CreateSandboxRequest(Request):
    """Memory in MiB; `timeout_sec` of inactivity pauses the sandbox, 0 never does."""

    template: str = "minimal"
    vcpus: Integer = 1
    memory_mb: Integer = 512
    timeout_sec: Integer = 0
    network: NetworkPolicy = NetworkPolicy()


class ResumeSandboxRequest(Request):
    """Without `memory` the sandbox is rebooted: its files are kept, its processes are gone."""

    needed: ClassVar[bool] = False
    memory: bool = True


class Sandbox(Response):
    id: str
    status: Annotated[
        Status, WithJsonSchema({"type": "string", "enum": [status.value for status in Status]})
    ]
    template: str
    vcpus: int
    memory_mb: int
    timeout_sec: int
    network: NetworkPolicy
    guest_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    host_ip: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    reason: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    created_at: datetime
    started_at: NullableTime = None
    last_active_at: NullableTime = None
    last_updated: datetime
    disk_bytes: Annotated[int, Field(json_schema_extra={"format": "int64"})]
