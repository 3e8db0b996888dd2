"""What an operator is shown: plain rows across all teams, no secrets."""

from datetime import datetime

import msgspec

from wrenn_sandbox.ids import KeyId, SandboxId, TeamId, UserId


class UserRow(msgspec.Struct, frozen=True):
    """A user in one of their teams; `login` says how they prove who they are."""

    email: str
    id: UserId
    team_id: TeamId | None
    created_at: datetime
    disabled_at: datetime | None
    login: list[str]


class TeamRow(msgspec.Struct, frozen=True):
    """`running` counts sandboxes in flight too; `quota` is JSON text, None as for every team."""

    id: TeamId
    name: str
    created_at: datetime
    members: int
    keys: int
    running: int
    paused: int
    quota: str | None


class KeyRow(msgspec.Struct, frozen=True):
    id: KeyId
    key_prefix: str
    name: str
    team_id: TeamId
    created_at: datetime
    last_used: datetime | None


class SandboxRow(msgspec.Struct, frozen=True):
    """`state` is the internal one; memory in MiB."""

    id: SandboxId
    team_id: TeamId
    state: str
    template: str
    vcpus: int
    memory_mb: int
    created_at: datetime
    reason: str | None


class ActionRow(msgspec.Struct, frozen=True):
    """What an operator did, to whom or what."""

    at: datetime
    operator: str
    action: str
    subject: str
