"""What teams are told of: the types of events, and patterns that choose some of them."""

import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from .sandbox import Event

NETWORK: Final = "network"
"""What the history calls a change of a policy, which is none of the sandbox's state."""

SILENT: Final = "not_responding"
RESPONDING: Final = "responding"
"""What the history calls the beginning and the end of a guest's silence; no state changes."""

UPDATED: Final = "updated"
"""What the history calls a change of what callers say of a sandbox; no state changes."""

DEADLINE_NEAR: Final = "deadline_near"
"""What the history calls the last minute before a deadline; no state changes."""

CREATE: Final = "create"
REFUSED: Final = "refused"
"""The host had no room for a new sandbox, which has left no other trace."""

SANDBOX: Final = "sandbox."
SNAPSHOT_CREATED: Final = "snapshot.created"
SNAPSHOT_DELETED: Final = "snapshot.deleted"
KEY_CREATED: Final = "api_key.created"
KEY_DELETED: Final = "api_key.deleted"

TYPES: Final = (
    *(SANDBOX + each for each in (CREATE, *Event, REFUSED, UPDATED, DEADLINE_NEAR)),
    *(SANDBOX + each for each in (NETWORK, SILENT, RESPONDING)),
    SNAPSHOT_CREATED,
    SNAPSHOT_DELETED,
    KEY_CREATED,
    KEY_DELETED,
)

KEPT: Final = 10_000
"""How many of its last events a team can be told of again."""

KEPT_FOR: Final = timedelta(days=7)

PATTERNS: Final = 32
"""How many patterns choose events at most."""

_PATTERN: Final = re.compile(r"\*|[a-z_]{1,32}\.(\*|[a-z_]{1,32})")


class InvalidPattern(ValueError):
    """A pattern matches no event; `str()` says what to give."""


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise `InvalidPattern` for the first of them that no type of event matches."""
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern) or not any(matches([pattern], each) for each in TYPES):
            raise InvalidPattern(
                f"{pattern[:80]!r} matches no event: give types such as sandbox.paused, or "
                "sandbox.*, snapshot.*, api_key.* or *"
            )


def matches(patterns: Iterable[str], type: str) -> bool:
    """Whether one of the patterns is the type itself, its part before the dot and `*`, or `*`."""
    wanted = {type, "*", type.partition(".")[0] + ".*"}
    return any(pattern in wanted for pattern in patterns)
