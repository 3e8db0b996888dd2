"""A sandbox as E2B's clients are told of it."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, Self

from pydantic import Field

from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.model.sandbox import OnDeadline, Status

from .errors import content_of
from .fields import E2BResponse
from .names import CLIENT_ID
from .network import Network

_AGENT_VERSION: Final = "0.6.13"
"""The version of E2B's agent whose protocol the guest agent speaks: it unlocks what clients can."""

_NEVER: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""When what has no deadline ends: clients need a time."""


class SandboxState(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"


class OnTimeout(StrEnum):
    KILL = "kill"
    PAUSE = "pause"


class Started(E2BResponse):
    """What a client needs in order to use a sandbox."""

    template_id: str
    sandbox_id: str
    client_id: str = CLIENT_ID
    alias: str
    envd_version: str = _AGENT_VERSION

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, Sandbox)
        return cls(template_id=source.template, sandbox_id=source.id, alias=source.template)


class Listed(Started):
    """`diskSizeMB` is what it takes on the host's disk, `startedAt` when it was made."""

    started_at: datetime
    end_at: datetime
    cpu_count: int
    memory_mb: int
    disk_size_mb: int
    state: SandboxState
    metadata: dict[str, str]

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, Sandbox)
        return cls.model_validate(_listed(source))


class Lifecycle(E2BResponse):
    auto_resume: bool = False
    on_timeout: OnTimeout


class Detail(Listed):
    allow_internet_access: bool
    network: Network
    lifecycle: Lifecycle

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, Sandbox)
        pauses = source.on_deadline is OnDeadline.PAUSE
        return cls.model_validate(
            {
                **_listed(source),
                "allow_internet_access": source.network.internet,
                "network": Network.of(source.network),
                "lifecycle": Lifecycle(on_timeout=OnTimeout.PAUSE if pauses else OnTimeout.KILL),
            }
        )


def _listed(sandbox: Sandbox) -> dict[str, object]:
    return {
        "template_id": sandbox.template,
        "sandbox_id": sandbox.id,
        "alias": sandbox.template,
        "started_at": sandbox.created_at,
        "end_at": sandbox.deadline_at or _NEVER,
        "cpu_count": sandbox.vcpus,
        "memory_mb": sandbox.memory_mb,
        "disk_size_mb": -(-sandbox.disk_bytes >> 20),
        "state": SandboxState.PAUSED if sandbox.status is Status.PAUSED else SandboxState.RUNNING,
        "metadata": sandbox.metadata,
    }


class ForkError(E2BResponse):
    code: int
    message: str
    error_code: str = Field(alias="error_code")


class ForkResult(E2BResponse):
    """A new sandbox, or why it could not be made."""

    sandbox: Started | None = None
    error: ForkError | None = None

    @classmethod
    def of(cls, source: object) -> Self:
        if isinstance(source, WrennError):
            return cls(error=ForkError.model_validate(content_of(source)))
        return cls(sandbox=Started.of(source))
