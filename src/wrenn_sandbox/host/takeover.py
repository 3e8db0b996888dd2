"""What a new server finds of the ones before it: made its own, or removed."""

import asyncio
import shutil
from collections.abc import Callable
from contextlib import suppress

import structlog

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host import journal, stored
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.origin import Parts
from wrenn_sandbox.host.privileged.process import kill_now
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.ids import MachineId, SandboxId
from wrenn_sandbox.model.network import NetworkPolicy

_log = structlog.get_logger(__name__)


class TakeOver:
    """Adopts the machines that still run, takes the stored ones, and reclaims the rest."""

    def __init__(self, parts: Parts, new_sandbox: Callable[[SandboxId], Sandbox]) -> None:
        self._parts = parts
        self._new_sandbox = new_sandbox
        self._boot_id = journal.boot_id()
        self._sandboxes: dict[SandboxId, Sandbox] = {}

    async def run(self) -> dict[SandboxId, Sandbox]:
        """Every sandbox that runs or is stored here. Starts the network slots.

        A machine is adopted when its process is still the one in the journal, its monitor
        answers and nothing newer is stored of its sandbox. Whether the guest answers is its own
        affair.
        """
        parts = self._parts
        kept: dict[int, NetworkPolicy] = {}
        for directory in await asyncio.to_thread(lambda: sorted(parts.paths.run.iterdir())):
            journal_of = parts.paths.machine(MachineId(directory.name)).journal
            record = await asyncio.to_thread(journal.read, journal_of)
            machine = None if record is None else await self._adopted(record)
            if machine is not None:
                kept[machine.record.slot.index] = machine.record.network.policy()
                continue
            if record is not None and record.process is not None and self._is_current(record):
                await parts.driver.kill(record.process)  # a captured one can hide from the search
            for pid in await asyncio.to_thread(journal.processes_of, directory):
                await asyncio.to_thread(kill_now, pid)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            _log.info("reclaimed a machine", machine=directory.name)
        await parts.slots.start(keep=kept)
        await asyncio.to_thread(parts.store.sweep)
        await asyncio.to_thread(parts.store.forget_missing)
        for sandbox_id in await asyncio.to_thread(stored.all_ids, parts.paths):
            try:
                await self._take_stored(sandbox_id)
            except OSError as error:
                _log.error("not tidied up", sandbox=sandbox_id, detail=str(error))
        return self._sandboxes

    async def _adopted(self, record: Record) -> Machine | None:
        """The machine of a journal, now its sandbox's; None where there is nothing to adopt."""
        if record.sandbox_id is None or not self._may_run(record):
            return None
        with suppress(IncompatibleImage):
            complete = await asyncio.to_thread(stored.newest, self._parts.paths, record.sandbox_id)
            if complete is not None and complete.generation > record.generation:
                return None
        machine = await Machine.adopt(self._parts, record)
        if machine is None:
            return None
        sandbox = self._new_sandbox(record.sandbox_id)
        sandbox.own(machine)
        self._sandboxes[record.sandbox_id] = sandbox
        _log.info("adopted a machine", sandbox=record.sandbox_id, machine=record.machine_id)
        return machine

    def _may_run(self, record: Record) -> bool:
        return self._is_current(record) and record.driver == self._parts.driver.capabilities.name

    def _is_current(self, record: Record) -> bool:
        return record.boot_id == self._boot_id

    async def _take_stored(self, sandbox_id: SandboxId) -> None:
        """Take over what is stored of a sandbox, or tidy up behind one that runs."""
        paths = self._parts.paths
        running = self._sandboxes.get(sandbox_id)
        if running is not None:
            layers = running.machine.record.layers
            await asyncio.to_thread(stored.settle, paths, sandbox_id, layers)
            return
        sandbox = self._new_sandbox(sandbox_id)
        try:
            complete = await asyncio.to_thread(stored.newest, paths, sandbox_id)
        except IncompatibleImage as error:
            _log.error("a stored sandbox can not be read", sandbox=sandbox_id, detail=error.detail)
            sandbox.own_damaged(error)
            self._sandboxes[sandbox_id] = sandbox
            return
        if complete is None:
            await asyncio.to_thread(stored.keep, paths, sandbox_id, ())
            return
        sandbox.own_stored(complete)
        self._sandboxes[sandbox_id] = sandbox
        kept = {complete.generation, *complete.layers}
        await asyncio.to_thread(stored.keep, paths, sandbox_id, kept)
        await asyncio.to_thread(stored.strip, paths, sandbox_id, complete.layers)
        await asyncio.to_thread(stored.withdraw_disks, paths, sandbox_id, kept)
