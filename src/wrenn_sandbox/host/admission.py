"""Whether there is room on the host, decided before anything is started.

Room for a machine is counted twice: what the kernel has free now, less what was just promised and
is not taken yet; and what all machines may come to take together, which a factor bounds. Requests
are decided one after the other, and each remembers its promise before the next is looked at.
"""

import asyncio
import re
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import NoCapacity
from wrenn_sandbox.ids import OperationId, SandboxId
from wrenn_sandbox.settings import HostSettings
from wrenn_sandbox.wire.metrics import Shortage

_LATER_SEC: Final = 10.0
_WORDS: Final = {Shortage.MEMORY: "memory", Shortage.DISK: "disk space"}


@dataclass(frozen=True)
class _Shortage:
    of: Shortage
    missing_mb: int = 0
    """How much memory has to be freed; 0 where that would not help."""


class Admission:
    """`running` gives the memory in MiB of each sandbox that runs; `make_room` frees so many MiB
    that nobody was promised, where it can.
    """

    def __init__(
        self,
        settings: HostSettings,
        running: Callable[[], Mapping[SandboxId, int]],
        make_room: Callable[[int], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._running = running
        self._make_room = make_room
        self._promised: dict[tuple[SandboxId, OperationId], int] = {}
        self.refusals: Counter[Shortage] = Counter()
        """Requests for which there was no room."""
        self._turn = asyncio.Lock()
        self._closed = False

    async def reserve(
        self, sandbox_id: SandboxId, operation_id: OperationId, memory_mb: int
    ) -> None:
        """Promise a sandbox its machine, until `release`; raises `NoCapacity`."""
        async with self._turn:
            if self._closed:
                raise NoCapacity("The host is shutting down", retry_after=_LATER_SEC)
            others = self._others(sandbox_id)
            if len(others) >= self._settings.max_running:
                self.refusals[Shortage.SANDBOXES] += 1
                raise _full("The host runs as many sandboxes as it may")
            shortage = await self._shortage(others, memory_mb)
            if shortage is not None and shortage.missing_mb:
                await self._make_room(shortage.missing_mb)
                others = self._others(sandbox_id)
                shortage = await self._shortage(others, memory_mb)
            if shortage is not None:
                self.refusals[shortage.of] += 1
                raise _full(f"The host has no {_WORDS[shortage.of]} left for another sandbox")
            self._promised[sandbox_id, operation_id] = memory_mb

    def release(self, sandbox_id: SandboxId, operation_id: OperationId) -> None:
        """Forget a promise: its machine runs, or will not; harmless without one."""
        self._promised.pop((sandbox_id, operation_id), None)

    @property
    def promised_mb(self) -> int:
        """The memory of every machine that runs or is promised."""
        return sum(self._others(None).values())

    def bound_mb(self, total_mb: int) -> int | None:
        """What all machines may come to take of so much memory; None where nothing bounds that."""
        settings = self._settings
        if not settings.memory_overcommit:
            return None
        return int(settings.memory_overcommit * (total_mb - settings.memory_reserve_mb))

    async def has_room(self, memory_mb: int) -> bool:
        """Whether a machine that was not asked for may be made ready."""
        if self._closed:
            return False
        return await self._shortage(self._others(None), memory_mb) is None

    async def require_disk(self, needed_mb: int, *, share: float = 1.0) -> None:
        """Raise `NoCapacity` unless so much can be written and `share` of the reserve stays."""
        await asyncio.to_thread(require_disk, self._settings, needed_mb, share=share)

    def close(self) -> None:
        """Refuse everything from now on."""
        self._closed = True

    def _others(self, sandbox_id: SandboxId | None) -> dict[SandboxId, int]:
        """The memory of every machine that runs or is promised, but for this sandbox's."""
        others = {**self._running(), **{each: mb for (each, _), mb in self._promised.items()}}
        if sandbox_id is not None:
            others.pop(sandbox_id, None)
        return others

    async def _shortage(self, others: Mapping[SandboxId, int], memory_mb: int) -> _Shortage | None:
        """What keeps one more machine of this size out; None where nothing does."""
        settings = self._settings
        free = await asyncio.to_thread(measure, settings.data_dir)
        bound = self.bound_mb(free.memory_total_mb)
        if bound is not None and sum(others.values()) + memory_mb > bound:
            return _Shortage(Shortage.MEMORY)
        if free.disk_free_mb < settings.disk_reserve_mb:
            return _Shortage(Shortage.DISK)
        promised = sum(mb for (each, _), mb in self._promised.items() if each in others)
        missing = settings.memory_reserve_mb + promised + memory_mb - free.memory_free_mb
        return _Shortage(Shortage.MEMORY, missing) if missing > 0 else None


def _full(what: str) -> NoCapacity:
    return NoCapacity(f"{what}; delete or pause one, or try again later", retry_after=_LATER_SEC)


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


def require_disk(settings: HostSettings, needed_mb: int, *, share: float = 1.0) -> None:
    """Raise `NoCapacity` unless so much can be written and `share` of the reserve stays; blocks."""
    free_mb = measure(settings.data_dir).disk_free_mb
    if free_mb - needed_mb < settings.disk_reserve_mb * share:
        raise NoCapacity("The host has no disk space left for that", retry_after=60)


def require_room(settings: HostSettings, size: int) -> None:
    """As `require_disk`, for so many bytes."""
    require_disk(settings, size >> 20)
