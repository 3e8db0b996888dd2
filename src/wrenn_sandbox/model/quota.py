"""How much of a host one team may have: limits, what is used of them, and which one is passed.

A limit of 0 is none. `running`, `vcpus` and `memory_mb` count sandboxes that have a machine or are
about to; `sandboxes` those and the paused ones; `disk_mb` what all of them and the snapshots take
on the host's disk, as last reported.
"""

from typing import Annotated, Final

import msgspec

from .sandbox import State

Limit = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000_000)]

HOLDING: Final = frozenset(
    {
        State.PENDING,
        State.STARTING,
        State.RUNNING,
        State.PAUSING,
        State.RESUMING,
        State.SNAPSHOTTING,
        State.ROLLING_BACK,
        State.STOPPING,
    }
)
"""The states in which a sandbox has a machine, or takes or gives one back."""

LEAVING: Final = frozenset({State.PAUSING, State.SNAPSHOTTING, State.STOPPING})
"""The states in which a machine is on its way out: who waits a little finds more room."""

EXISTING: Final = HOLDING | {State.PAUSED}


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one team; sizes in MiB, 0 for no limit."""

    running: Limit = 0
    vcpus: Limit = 0
    memory_mb: Limit = 0
    sandboxes: Limit = 0
    snapshots: Limit = 0
    disk_mb: Limit = 0
    api_keys: Limit = 0

    @property
    def disk_bytes(self) -> int:
        return self.disk_mb << 20


NO_LIMITS: Final = Quota()


class QuotaOverride(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What is different for one team; None is as for every team, 0 no limit."""

    running: Limit | None = None
    vcpus: Limit | None = None
    memory_mb: Limit | None = None
    sandboxes: Limit | None = None
    snapshots: Limit | None = None
    disk_mb: Limit | None = None
    api_keys: Limit | None = None

    def over(self, quota: Quota) -> Quota:
        """The limits that hold for the team where `quota` holds for every other."""
        own = msgspec.structs.asdict(self).items()
        return msgspec.structs.replace(quota, **{k: v for k, v in own if v is not None})


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one team has; memory in MiB, disk in bytes.

    `leaving` is the part of `running`, `vcpus` and `memory_mb` that is being given back.
    """

    running: int = 0
    vcpus: int = 0
    memory_mb: int = 0
    sandboxes: int = 0
    snapshots: int = 0
    disk_bytes: int = 0
    api_keys: int = 0
    leaving: "Usage | None" = None


class BadQuota(ValueError):
    """A text is not an override of quotas; `str()` says why."""


class OverQuota(Exception):
    """A limit is passed. `limit` names it, `str()` says what to do; `passing` where time helps."""

    def __init__(self, limit: str, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.limit = limit
        self.passing = passing


_SPACE: Final = "delete sandboxes or snapshots"
_MACHINES: Final = "pause or delete some"


def check_machines(quota: Quota, usage: Usage) -> None:
    """Raise `OverQuota` where a team would have more machines, or more in them, than it may."""
    leaving = usage.leaving or Usage()
    for limit, what in (
        ("running", "sandboxes that run"),
        ("vcpus", "vcpus in sandboxes that run"),
        ("memory_mb", "MiB of memory in sandboxes that run"),
    ):
        allowed, used, gone = (getattr(each, limit) for each in (quota, usage, leaving))
        if 0 < allowed < used:
            passing = used - gone <= allowed
            raise OverQuota(limit, _message(allowed, what, _MACHINES), passing=passing)


def check_sandboxes(quota: Quota, usage: Usage) -> None:
    """Raise `OverQuota` where a team would have more sandboxes, paused ones too, than it may."""
    if 0 < quota.sandboxes < usage.sandboxes:
        what = "sandboxes, paused ones included"
        raise OverQuota("sandboxes", _message(quota.sandboxes, what, "delete some"))


def check_snapshots(quota: Quota, usage: Usage) -> None:
    """Raise `OverQuota` where a team would have more snapshots than it may."""
    if 0 < quota.snapshots < usage.snapshots:
        what = "snapshots"
        raise OverQuota("snapshots", _message(quota.snapshots, what, "delete or overwrite one"))


def check_disk(quota: Quota, usage: Usage) -> None:
    """Raise `OverQuota` where a team would take more of the host's disk than it may."""
    if 0 < quota.disk_bytes < usage.disk_bytes:
        raise OverQuota("disk_mb", _message(quota.disk_mb, "MiB on the host's disk", _SPACE))


def check_api_keys(quota: Quota, usage: Usage) -> None:
    """Raise `OverQuota` where a team would have more API keys than it may."""
    if 0 < quota.api_keys < usage.api_keys:
        raise OverQuota("api_keys", _message(quota.api_keys, "API keys", "delete some"))


def _message(allowed: int, what: str, remedy: str) -> str:
    return f"This team may have at most {allowed} {what}; {remedy}, or ask the operator for more"


def encode_override(override: QuotaOverride) -> str:
    """The override as JSON text, without what it leaves as it is."""
    return msgspec.json.encode(override).decode("utf-8")


def decode_override(text: str) -> QuotaOverride:
    """The override of a JSON text such as `{"running": 5}`; raises `BadQuota`."""
    try:
        return msgspec.json.decode(text, type=QuotaOverride)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadQuota(f"not an override of quotas: {error}") from error
