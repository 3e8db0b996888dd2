"""What a host has left. Sizes in MiB."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from wrenn_sandbox.errors import NoCapacity
from wrenn_sandbox.settings import Settings

_LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Free:
    memory_total_mb: int
    memory_free_mb: int
    """What the kernel thinks new processes can have without swapping."""
    disk_free_mb: int


def measure(data_dir: Path) -> Free:
    """What is left now; blocks. Raises OSError."""
    memory = dict(_LINE.findall(Path("/proc/meminfo").read_text("ascii")))
    return Free(
        memory_total_mb=int(memory["MemTotal"]) // 1024,
        memory_free_mb=int(memory["MemAvailable"]) // 1024,
        disk_free_mb=shutil.disk_usage(data_dir).free >> 20,
    )


def require_disk(settings: Settings, needed_mb: int, *, share: float = 1.0) -> None:
    """Raise `NoCapacity` unless so much can be written and `share` of the reserve stays; blocks."""
    free_mb = measure(settings.data_dir).disk_free_mb
    if free_mb - needed_mb < settings.disk_reserve_mb * share:
        raise NoCapacity("The host has no disk space left for that.", retry_after=60)
