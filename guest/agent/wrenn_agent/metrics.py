"""Load of the guest, from /proc and statvfs."""

from __future__ import annotations

import os
import time

from .fields import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroups import CommandGroups


_TICKS = 100
"""Of a second, for each CPU in /proc/stat."""


class Metrics:
    """Gauges of this machine. CPU use is that since another reading, a second ago or more: several
    callers read them.
    """

    def __init__(self, groups: CommandGroups | None) -> None:
        self._groups = groups
        self._last_cpu = (0, 0)
        self._cpu_used_pct = 0.0

    def read(self) -> Message:
        """Times in unix seconds, sizes in bytes, CPU in per cent of all CPUs.

        Bounds of commands (`mem_limit`, `process_limit`) only where there are any.
        """
        memory = _memory()
        disk = os.statvfs("/")
        total, available = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
        return {
            **({} if self._groups is None else self._groups.limits()),
            "ts": int(time.time()),
            "cpu_count": os.cpu_count() or 1,
            "cpu_used_pct": self._cpu_used(),
            "mem_total": total,
            "mem_used": total - available,
            "mem_cache": memory.get("Cached", 0) + memory.get("Buffers", 0),
            "disk_used": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
            "disk_total": disk.f_blocks * disk.f_frsize,
        }

    def _cpu_used(self) -> float:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(value) for value in file.readline().split()[1:9]]
        idle, total = ticks[3] + ticks[4], sum(ticks)
        last_idle, last_total = self._last_cpu
        if total - last_total >= _TICKS * (os.cpu_count() or 1):
            self._last_cpu = (idle, total)
            busy = 1 - (idle - last_idle) / (total - last_total)
            self._cpu_used_pct = round(100 * min(max(busy, 0.0), 1.0), 2)
        return self._cpu_used_pct


def _memory() -> dict[str, int]:
    result: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            fields = rest.split()
            if len(fields) == 2:
                result[name] = int(fields[0]) * 1024
    return result
