"""A sandbox as E2B's clients are told of it."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final, Self

from fastapi import Depends
from pydantic import Field, TypeAdapter
from starlette.requests import Request

from wrenn_sandbox.control.api.services import ServicesDependency
from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.model.sandbox import OnDeadline, Status

from .errors import content_of
from .fields import E2BResponse
from .network import Network

_AGENT_VERSION: Final = "0.6.13"
"""The version of E2B's agent whose protocol the guest agent speaks: it unlocks what clients can."""

_CLIENT_ID: Final = "wrenn"
"""What E2B calls the machine; a host of ours has no name for callers."""

_NEVER: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""When what has no deadline ends: clients need a time."""


_PORT: Final = re.compile(r":[0-9]{1,5}\Z")


class SandboxState(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"


class OnTimeout(StrEnum):
    KILL = "kill"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class Reached:
    """A sandbox, and how whoever is told of it reaches its ports; `domain` may end with a port."""

    sandbox: Sandbox
    domain: str
    agent_token: str
    traffic_token: str | None


class Reach:
    """Says of a sandbox how the client of this request reaches it."""

    def __init__(self, request: Request, services: ServicesDependency) -> None:
        self._ports = services.ports
        port = _PORT.search(request.headers.get("host", ""))
        self._domain = services.ports.domain + ("" if port is None else port[0])

    def __call__(self, sandbox: Sandbox) -> Reached:
        token = self._ports.traffic_token(sandbox.id) if sandbox.private_ports else None
        return Reached(sandbox, self._domain, self._ports.agent_token(sandbox.id), token)

    def without_tokens(self, sandbox: Sandbox) -> Reached:
        """The same for an answer that is kept: its tokens are empty."""
        return Reached(sandbox, self._domain, "", "" if sandbox.private_ports else None)

    def complete(self, text: str) -> str:
        """A kept `Started`, with its tokens."""
        started = Started.model_validate_json(text, by_alias=True)
        return self._with_tokens(started).model_dump_json(exclude_none=True)

    def complete_forks(self, text: str) -> str:
        """Kept `ForkResult`s, with the tokens of their sandboxes."""
        completed = [
            fork
            if fork.sandbox is None
            else fork.model_copy(update={"sandbox": self._with_tokens(fork.sandbox)})
            for fork in _FORKS.validate_json(text, by_alias=True)
        ]
        return _FORKS.dump_json(completed, exclude_none=True).decode("utf-8")

    def _with_tokens(self, started: "Started") -> "Started":
        id = SandboxId(started.sandbox_id)
        tokens = {"envd_access_token": self._ports.agent_token(id)}
        if started.traffic_access_token is not None:
            tokens["traffic_access_token"] = self._ports.traffic_token(id)
        return started.model_copy(update=tokens)


ReachedDependency = Annotated[Reach, Depends()]


class Started(E2BResponse):
    """What a client needs in order to use a sandbox."""

    template_id: str
    sandbox_id: str
    client_id: str = _CLIENT_ID
    alias: str
    envd_version: str = _AGENT_VERSION
    envd_access_token: str
    traffic_access_token: str | None = None
    domain: str

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, Reached)
        return cls(
            template_id=source.sandbox.template,
            sandbox_id=source.sandbox.id,
            alias=source.sandbox.template,
            envd_access_token=source.agent_token,
            traffic_access_token=source.traffic_token,
            domain=source.domain,
        )


class Listed(E2BResponse):
    """`diskSizeMB` is what it takes on the host's disk, `startedAt` when it was made."""

    template_id: str
    sandbox_id: str
    client_id: str = _CLIENT_ID
    alias: str
    envd_version: str = _AGENT_VERSION
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
    auto_resume: bool
    on_timeout: OnTimeout


class Detail(Listed):
    envd_access_token: str
    domain: str
    allow_internet_access: bool
    network: Network
    lifecycle: Lifecycle

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, Reached)
        sandbox = source.sandbox
        pauses = sandbox.on_deadline is OnDeadline.PAUSE
        return cls.model_validate(
            {
                **_listed(sandbox),
                "envd_access_token": source.agent_token,
                "domain": source.domain,
                "allow_internet_access": sandbox.network.internet,
                "network": Network.of(sandbox),
                "lifecycle": Lifecycle(
                    auto_resume=sandbox.auto_resume,
                    on_timeout=OnTimeout.PAUSE if pauses else OnTimeout.KILL,
                ),
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


_FORKS: Final = TypeAdapter(list[ForkResult])
