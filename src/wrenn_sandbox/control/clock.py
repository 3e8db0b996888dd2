"""The time of day, passed in wherever it matters."""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Gives the present as a timezone-aware UTC time."""


def utc_now() -> datetime:
    return datetime.now(UTC)
