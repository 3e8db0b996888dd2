"""Bounds on what a guest says in numbers and words."""

from typing import Annotated, Final

import msgspec

Pid = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
ExitCode = Annotated[int, msgspec.Meta(ge=0, le=255)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]

MESSAGE_LIMIT: Final = 2000
"""Characters of an error's message."""


def words(text: str) -> str:
    """A guest's message as callers, logs and terminals may see it: no control characters."""
    kept = text[:MESSAGE_LIMIT]
    return "".join(each if each.isprintable() else " " for each in kept)
