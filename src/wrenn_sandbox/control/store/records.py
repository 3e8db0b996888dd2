"""Rows as the services see them: frozen, typed, times in UTC.

A record has the names of its columns: `record` makes one of a row, `values` a row of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import ClassVar, TypeVar

import msgspec
from sqlalchemy import Executable, Row, Select, Table, and_, or_

from wrenn_sandbox.ids import (
    ImageId,
    KeyId,
    OperationId,
    SandboxId,
    SecretId,
    TeamId,
    UserId,
    WebhookId,
)
from wrenn_sandbox.model.sandbox import OnDeadline, State, Status
from wrenn_sandbox.model.template import TemplateType
from wrenn_sandbox.wire.messages import Egress

Record = TypeVar("Record")

Query = Executable


def record(kind: type[Record], row: Row[*tuple[object, ...]]) -> Record:
    """The columns of a row that a `kind` has, as one."""
    return msgspec.convert(row, kind, from_attributes=True)


def values(
    of: (
        "ApiKey | Delivery | ForkImage | Identity | KeyedRequest | Rollback | Sandbox"
        " | SandboxUpdate | Secret | SnapshotIntent | TeamTemplate | Webhook"
    ),
) -> dict[str, object]:
    """The columns of a record's row."""
    return {field.name: getattr(of, field.name) for field in fields(of)}


@dataclass(frozen=True, slots=True)
class Account:
    """A user together with the team that a login acts for."""

    user_id: UserId
    team_id: TeamId
    email: str
    password_hash: str | None
    disabled_at: datetime | None = None
    tokens_not_before: datetime | None = None
    """Tokens issued earlier do not count; a whole second."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A person as a provider knows them; `subject` is the provider's id of them."""

    provider: str
    subject: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: KeyId
    team_id: TeamId
    name: str
    key_prefix: str
    created_at: datetime
    last_used: datetime | None


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """What the check of an API key yields."""

    key_id: KeyId
    team_id: TeamId
    last_used: datetime | None


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One sandbox. `state` is the internal one, `status` what callers see; memory in MiB.

    `disk_bytes` is what it takes on the host's disk, as last reported. `deadline_told` is the
    deadline whose coming its history has noted. `running_since` is None while it does not run; a
    rollback of a running one changes `started_at` alone. Traffic to its ports resumes it with
    `auto_resume`, and needs its token with `private_ports`.
    """

    id: SandboxId
    team_id: TeamId
    state: State
    status: Status
    template: str
    image_id: ImageId
    vcpus: int
    memory_mb: int
    timeout_sec: int
    network: Egress
    metadata: dict[str, str]
    created_at: datetime
    last_updated: datetime
    guest_ip: str | None = None
    host_ip: str | None = None
    reason: str | None = None
    started_at: datetime | None = None
    running_since: datetime | None = None
    last_active_at: datetime | None = None
    disk_bytes: int = 0
    deadline_at: datetime | None = None
    deadline_told: datetime | None = None
    on_deadline: OnDeadline = OnDeadline.PAUSE
    auto_resume: bool = False
    private_ports: bool = False


@dataclass(frozen=True, slots=True)
class SandboxFilter:
    """What a list shows: sandboxes for which all of this holds; nothing given lets all through."""

    statuses: Sequence[Status] = ()
    """Any of these."""
    template: str | None = None
    labels: Sequence[tuple[str, str]] = ()
    """Keys with their values, every one of them."""
    created_after: datetime | None = None
    oldest_first: bool = False


@dataclass(frozen=True, slots=True)
class SandboxUpdate:
    """What a caller changes of a sandbox; None leaves it. `deadline_sec` is from now, 0 is none.

    `deadline_at_least_sec` only moves a deadline away, to so many seconds from now.
    """

    metadata: dict[str, str] | None = None
    timeout_sec: int | None = None
    deadline_sec: int | None = None
    deadline_at_least_sec: int | None = None
    on_deadline: OnDeadline | None = None
    auto_resume: bool | None = None
    private_ports: bool | None = None


@dataclass(frozen=True, slots=True)
class SandboxEvent:
    """One transition: what happened, from and to which state, why and by whom."""

    number: int
    event: str
    from_state: State | None
    to_state: State
    reason: str | None
    actor: str
    at: datetime


@dataclass(frozen=True, slots=True)
class TeamEvent:
    """What a team is told: `number` is its place among the team's, `data` an object in JSON."""

    team_id: TeamId
    number: int
    type: str
    at: datetime
    data: str


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where a team wants to be told of events. `events` are patterns with spaces in between.

    `position` is the last event that is settled. The one behind it has been tried `attempts` times
    since `trying_since`; no delivery has succeeded since `failing_since`.
    """

    id: WebhookId
    team_id: TeamId
    url: str
    events: str
    description: str
    secret: str
    created_at: datetime
    position: int = 0
    attempts: int = 0
    trying_since: datetime | None = None
    retry_at: datetime | None = None
    failing_since: datetime | None = None
    claimed_until: datetime | None = None
    disabled_at: datetime | None = None
    disabled_reason: str | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(self.events.split())


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret of a team. Each value has a `version` of its own, which tells nothing of it."""

    id: SecretId
    team_id: TeamId
    name: str
    sealed: bytes
    version: str
    created_at: datetime
    updated_at: datetime

    @property
    def purpose(self) -> str:
        """What its value was sealed for: nobody can give it out as another one."""
        return f"{self.team_id} {self.id}"


class Outcome(StrEnum):
    """What became of an attempt to deliver: `retrying` is another one to come."""

    DELIVERED = "delivered"
    RETRYING = "retrying"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt to deliver an event: the status of the answer, or why there was none."""

    webhook_id: WebhookId
    event_id: str
    type: str
    attempt: int
    outcome: Outcome
    status: int | None
    error: str | None
    duration_ms: int
    at: datetime
    number: int = 0


@dataclass(frozen=True, slots=True)
class TeamTemplate:
    """A team's own snapshot; `size_bytes` counts allocated bytes.

    `sandbox_id` is the sandbox that it was made of, None where that was not written down.
    """

    type: ClassVar = TemplateType.SNAPSHOT
    name: str
    image_id: ImageId
    vcpus: int
    memory_mb: int
    size_bytes: int
    created_at: datetime
    sandbox_id: SandboxId | None = None


@dataclass(frozen=True, slots=True)
class SnapshotIntent:
    """A snapshot under way: enough to finish or undo it after a crash."""

    team_id: TeamId
    name: str
    sandbox_id: SandboxId
    operation_id: OperationId
    image_id: ImageId


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request with an idempotency key. `digest` stands for all that the caller says in it.

    `subject` is the id of what it makes, chosen before it is made; `answer` is there once it was.
    """

    team_id: TeamId
    operation: str
    key: str
    digest: str
    subject: str
    created_at: datetime
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class ForkImage:
    """What the forks of a sandbox are started from, as long as they are being started."""

    image_id: ImageId
    sandbox_id: SandboxId
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Rollback:
    """A rollback under way: enough to finish it after a crash."""

    sandbox_id: SandboxId
    operation_id: OperationId
    image_id: ImageId


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a list that is sorted by time: the last row already given out."""

    at: datetime
    key: str


def newest_first(
    query: Select[*tuple[object, ...]], table: Table, limit: int | None, after: Position | None
) -> Select[*tuple[object, ...]]:
    """`query` sorted by `created_at` and `id` of `table`, newest first, from `after` on."""
    created_at, key = table.c.created_at, table.c.id
    query = query.order_by(created_at.desc(), key.desc())
    if after is not None:
        query = query.where(
            or_(created_at < after.at, and_(created_at == after.at, key < after.key))
        )
    return query.limit(limit)


def oldest_first(
    query: Select[*tuple[object, ...]], table: Table, limit: int | None, after: Position | None
) -> Select[*tuple[object, ...]]:
    """The same the other way round."""
    created_at, key = table.c.created_at, table.c.id
    query = query.order_by(created_at, key)
    if after is not None:
        query = query.where(
            or_(created_at > after.at, and_(created_at == after.at, key > after.key))
        )
    return query.limit(limit)
