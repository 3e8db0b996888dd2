"""Bounds of what a caller may ask for. Sizes are MiB, times are seconds."""

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

TEMPLATE_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
EXEC_TIMEOUT_DEFAULT: Final = 30
EXEC_TIMEOUT_MAX: Final = 3600
EMAIL_MAX: Final = 320
PASSWORD_MIN: Final = 8
PASSWORD_MAX: Final = 1024
IDEMPOTENCY_KEYS_KEPT: Final = 1000
"""How many idempotency keys of a team are remembered at most."""
IDEMPOTENCY_KEPT_SEC: Final = 24 * 3600
DEADLINE_MAX_SEC: Final = 365 * 24 * 3600
FORKS_MAX: Final = 20
"""How many forks of a sandbox one request makes at most."""
EVENTS_KEPT: Final = 1000
"""How many of its last transitions the history of a sandbox holds."""
ENDED_KEPT: Final = 1000
"""How many stopped and failed sandboxes of a team are listed at most."""
LABELS_MAX: Final = 32
LABEL_KEY_MAX: Final = 128
LABEL_VALUE_MAX: Final = 512
"""Labels of a sandbox; characters of a key, of which it has one at least, and of a value."""
LABELS_BYTES: Final = 8 * 1024
"""All labels of a sandbox together: the list of a team's sandboxes is read and told whole."""
ENVIRONMENT_NAMES: Final = 64
ENVIRONMENT_BYTES: Final = 32 * 1024
"""Environment variables that all commands of a sandbox get, and their names and values in all."""
EVENT_STREAMS_PER_TEAM: Final = 64
EVENT_STREAMS_PER_CALLER: Final = 16
"""How many streams of events may be open at once, by all callers of a team and by one of them."""
COMMAND_BYTES: Final = 1024 * 1024
"""Of a command with its arguments and environment; a guest's kernel takes two MiB at most."""

_RATE: Final = re.compile(
    r"\s*(\d+)\s*(?:/|per\b)\s*(\d*)\s*(second|minute|hour|day)s?\s*", re.ASCII | re.IGNORECASE
)
_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


class Rate(NamedTuple):
    """`amount` times within `seconds`."""

    amount: int
    seconds: int


def parse_rate(text: str) -> Rate:
    """A rate such as `20/minute`, `20 per minute` or `20/5 minutes`; raises `ValueError`."""
    match = _RATE.fullmatch(text)
    if match is None or int(match[1]) < 1:
        raise ValueError(f"{text!r} is not a rate such as 20/minute")
    return Rate(int(match[1]), int(match[2] or 1) * _SECONDS[match[3].lower()])


class OutOfBounds(ValueError):
    """A value is outside its bounds; `str()` names field and bounds."""


@dataclass(frozen=True)
class Bounds:
    """What one sandbox may have."""

    max_vcpus: int
    min_memory_mb: int
    max_memory_mb: int
    max_timeout_sec: int

    def check(
        self,
        *,
        vcpus: int | None = None,
        memory_mb: int | None = None,
        timeout_sec: int | None = None,
        deadline_sec: int | None = None,
    ) -> None:
        """Raise `OutOfBounds` for the first value that is given and outside its bounds."""
        for name, value, low, high in (
            ("vcpus", vcpus, 1, self.max_vcpus),
            ("memory_mb", memory_mb, self.min_memory_mb, self.max_memory_mb),
            ("timeout_sec", timeout_sec, 0, self.max_timeout_sec),
            ("deadline_sec", deadline_sec, 0, DEADLINE_MAX_SEC),
        ):
            if value is not None and not low <= value <= high:
                raise OutOfBounds(f"{name} must be between {low} and {high}")
