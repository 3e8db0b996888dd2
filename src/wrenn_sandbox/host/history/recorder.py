"""Measures all sandboxes that run, every five seconds, and keeps what their consoles say.

The host itself measures CPU time and network; only the guest can tell of its memory and disk, and
what it says is bounded and clamped. A guest that does not answer in time is asked again a minute
later: a sample without these numbers is kept meanwhile. The guests are asked one after the other
over a part of the time, never all at once.
"""

import asyncio
import shutil
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.privileged.process import cpu_seconds
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.host.slot import Traffic
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import GuestMetrics, Phase, Sample

from .samples import KEPT_SEC, STEP_SEC, SampleFile, Stored

_log = structlog.get_logger(__name__)

_SPREAD_SEC: Final = 2.0
"""Within this time all guests are asked, each within its own part of it."""
_ANSWER_SEC: Final = 2.0
_AGAIN_SEC: Final = 60
_TIDY_SEC: Final = 600
ENDED_BYTES: Final = 1 << 30
"""What the histories of sandboxes that are no longer here may take together."""


@dataclass
class _Watched:
    """What is known of a machine since it was last measured."""

    machine: Machine
    life: int
    cpu_seconds: float
    measured: float
    ask_after: int = 0
    written: Stored | None = None


class Recorder:
    """One task for all sandboxes of a host; `sandboxes` changes as they come and go."""

    def __init__(self, context: HostContext, sandboxes: Mapping[SandboxId, Sandbox]) -> None:
        self._context = context
        self._sandboxes = sandboxes
        self._watched: dict[SandboxId, _Watched] = {}
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._worker = asyncio.create_task(self._work(), name="recorder")

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        tidied = time.monotonic()
        while True:
            now = self._context.clock().timestamp()
            await asyncio.sleep(STEP_SEC - now % STEP_SEC)
            try:
                await self.measure(round(self._context.clock().timestamp()) // STEP_SEC * STEP_SEC)
                if time.monotonic() - tidied >= _TIDY_SEC:
                    tidied = time.monotonic()
                    await self.tidy()
            except Exception:
                _log.exception("sandboxes are not measured")

    async def measure(self, at: int) -> None:
        """Take one sample of each sandbox that runs, for the time `at`; keep consoles."""
        running = {
            sandbox_id: sandbox.machine
            for sandbox_id, sandbox in self._sandboxes.items()
            if sandbox.phase is Phase.RUNNING
        }
        for gone in self._watched.keys() - running.keys():
            del self._watched[gone]
        part = _SPREAD_SEC / max(1, len(running))
        async with asyncio.TaskGroup() as group:
            asked = {
                sandbox_id: group.create_task(self._ask(sandbox_id, machine, at, n * part))
                for n, (sandbox_id, machine) in enumerate(running.items())
            }
        answers = {sandbox_id: task.result() for sandbox_id, task in asked.items()}
        await asyncio.to_thread(self._write, running, answers, at)

    async def _ask(
        self, sandbox_id: SandboxId, machine: Machine, at: int, wait: float
    ) -> GuestMetrics | None:
        await asyncio.sleep(wait)
        try:
            await machine.keep_log()
        except Exception:
            _log.exception("a console is not kept", sandbox=sandbox_id)
        watched = self._watched.get(sandbox_id)
        if watched is None or watched.machine is not machine or at < watched.ask_after:
            return None
        try:
            async with asyncio.timeout(patience(_ANSWER_SEC)):
                return await machine.client.metrics()
        except (TimeoutError, WrennError):
            watched.ask_after = at + _AGAIN_SEC
            return None

    def _write(
        self,
        running: Mapping[SandboxId, Machine],
        answers: Mapping[SandboxId, GuestMetrics | None],
        at: int,
    ) -> None:
        traffic = self._context.slots.traffic()
        for sandbox_id, machine in running.items():
            try:
                self._write_one(sandbox_id, machine, answers[sandbox_id], traffic, at)
            except (OSError, WrennError) as error:
                _log.debug("a sandbox is not measured", sandbox=sandbox_id, detail=str(error))

    def _write_one(
        self,
        sandbox_id: SandboxId,
        machine: Machine,
        said: GuestMetrics | None,
        traffic: Mapping[int, Traffic],
        at: int,
    ) -> None:
        process, record = machine.process, machine.record
        used, now = cpu_seconds(process.pid, process.start_time), time.monotonic()
        file = self.file(sandbox_id)
        watched = self._watched.get(sandbox_id)
        if watched is None or watched.machine is not machine:
            life = zlib.crc32(record.machine_id.encode())
            self._watched[sandbox_id] = _Watched(machine, life, used, now, 0, file.newest())
            return
        share = (used - watched.cpu_seconds) / (now - watched.measured) / record.vcpus
        watched.cpu_seconds, watched.measured = used, now
        counted = traffic.get(record.slot.index)
        total = None
        if counted is not None:
            before = watched.written or Stored(Sample(time=0, cpu_count=0, cpu_used_pct=0))
            total = before.added(watched.life, counted)
        sample = Sample(
            time=at,
            cpu_count=record.vcpus,
            cpu_used_pct=min(max(100 * share, 0.0), 100.0),
            net_received=None if total is None else total.received,
            net_sent=None if total is None else total.sent,
            **({} if said is None else _clamped(said, record.memory_mb << 20)),
        )
        self._context.paths.history(sandbox_id).mkdir(mode=0o700, exist_ok=True)
        watched.written = Stored(sample, watched.life, counted or Traffic(0, 0))
        file.add(watched.written)

    def file(self, sandbox_id: SandboxId) -> SampleFile:
        """The samples of a sandbox, whether it is here or not."""
        return SampleFile(self._context.paths.history(sandbox_id) / "samples")

    async def tidy(self) -> None:
        """Remove what has been kept for a day of sandboxes that are no longer here.

        The oldest go earlier where all of them take too much.
        """
        await asyncio.to_thread(self._tidy, self._context.clock().timestamp() - KEPT_SEC)

    def _tidy(self, before: float) -> None:
        ended = [
            found
            for each in self._context.paths.histories.iterdir()
            if each.name not in self._sandboxes and (found := _measured(each)) is not None
        ]
        total = sum(size for _, size, _ in ended)
        for changed, size, directory in sorted(ended):
            if changed >= before and total <= ENDED_BYTES:
                break
            shutil.rmtree(directory, ignore_errors=True)
            total -= size


def _measured(directory: Path) -> tuple[float, int, Path] | None:
    """When something was last written there, and how many bytes it takes; None where it is gone."""
    with suppress(OSError):
        stats = [each.stat() for each in (directory, *directory.iterdir())]
        return (
            max(each.st_mtime for each in stats),
            sum(each.st_blocks * 512 for each in stats),
            directory,
        )
    return None


def _clamped(said: GuestMetrics, memory: int) -> dict[str, int]:
    """What a guest says of itself, within what can be."""
    total = min(said.mem_total, memory)
    return {
        "mem_total": total,
        "mem_used": min(said.mem_used, total),
        "mem_cache": min(said.mem_cache, total),
        "disk_total": said.disk_total,
        "disk_used": min(said.disk_used, said.disk_total),
    }
