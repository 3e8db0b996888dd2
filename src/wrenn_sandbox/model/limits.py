"""Bounds of what a caller may ask for. Sizes are MiB, times are seconds."""

import re
from dataclasses import dataclass
from typing import Final

TEMPLATE_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")
EXEC_TIMEOUT_DEFAULT: Final = 30
EXEC_TIMEOUT_MAX: Final = 3600
PASSWORD_MIN: Final = 8
PASSWORD_MAX: Final = 1024


class OutOfBounds(ValueError):
    """A value is outside its bounds; `str()` names field and bounds."""


@dataclass(frozen=True)
class Bounds:
    """What one sandbox may have."""

    max_vcpus: int
    min_memory_mb: int
    max_memory_mb: int
    max_timeout_sec: int

    def check(self, *, vcpus: int, memory_mb: int, timeout_sec: int) -> None:
        """Raise `OutOfBounds` for the first value outside its bounds."""
        for name, value, low, high in (
            ("vcpus", vcpus, 1, self.max_vcpus),
            ("memory_mb", memory_mb, self.min_memory_mb, self.max_memory_mb),
            ("timeout_sec", timeout_sec, 0, self.max_timeout_sec),
        ):
            if not low <= value <= high:
                raise OutOfBounds(f"{name} must be between {low} and {high}")
