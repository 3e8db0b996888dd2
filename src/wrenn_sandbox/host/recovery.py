"""What a new server finds of the ones before it: made its own, or removed."""

import asyncio
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from wrenn_sandbox.errors import Conflict, IncompatibleImage
from wrenn_sandbox.host.privileged.process import kill_now
from wrenn_sandbox.ids import MachineId, SandboxId
from wrenn_sandbox.model.network import NetworkPolicy

from . import journal, paused
from .context import HostContext
from .journal import Record
from .machine import Machine
from .paths import Paths, write_durably
from .sandbox import Sandbox

_log = structlog.get_logger(__name__)


class Recovery:
    """Adopts the machines that still run, takes the stored ones, and reclaims the rest."""

    def __init__(self, context: HostContext, new_sandbox: Callable[[SandboxId], Sandbox]) -> None:
        self._context = context
        self._new_sandbox = new_sandbox
        self._boot_id = journal.boot_id()
        self._sandboxes: dict[SandboxId, Sandbox] = {}

    async def run(self) -> dict[SandboxId, Sandbox]:
        """Every sandbox that runs or is stored here. Starts the network slots.

        A machine is adopted when its process is still the one in the journal, its monitor
        answers and nothing newer is stored of its sandbox, or runs: a server may have died between
        a rollback and the end of what was before. Whether the guest answers is its own affair.
        """
        context = self._context
        kept: dict[int, NetworkPolicy] = {}
        for directory, record in await asyncio.to_thread(self._found):
            machine = None if record is None else await self._adopted(record)
            if machine is not None:
                kept[machine.record.slot.index] = machine.record.network.policy()
                continue
            if record is not None and record.process is not None and self._is_current(record):
                await context.driver.kill(record.process)  # a captured one can hide from the search
            for pid in await asyncio.to_thread(journal.processes_of, directory):
                await asyncio.to_thread(kill_now, pid)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            _log.info("reclaimed a machine", machine=directory.name)
        await context.slots.start(keep=kept)
        await asyncio.to_thread(context.store.sweep)
        await asyncio.to_thread(context.store.forget_missing)
        for sandbox_id in await asyncio.to_thread(paused.all_ids, context.paths):
            try:
                await self._take_stored(sandbox_id)
            except OSError as error:
                _log.error("not tidied up", sandbox=sandbox_id, detail=str(error))
        return self._sandboxes

    def _found(self) -> list[tuple[Path, Record | None]]:
        """The directories of all machines with their records, newer ones of a sandbox first."""
        paths = self._context.paths
        machines = [paths.machine(MachineId(each.name)) for each in sorted(paths.run.iterdir())]
        found = [(each.directory, journal.read(each.journal)) for each in machines]
        return sorted(found, key=lambda each: -each[1].generation if each[1] else 0)

    async def _adopted(self, record: Record) -> Machine | None:
        """The machine of a journal, now its sandbox's; None where there is nothing to adopt."""
        driver = self._context.driver.capabilities.name
        if record.sandbox_id is None or record.sandbox_id in self._sandboxes:
            return None
        if record.driver != driver or not self._is_current(record):
            return None
        with suppress(IncompatibleImage):
            complete = await asyncio.to_thread(
                paused.newest, self._context.paths, record.sandbox_id
            )
            if complete is not None and complete.generation > record.generation:
                return None
        machine = await Machine.adopt(self._context, record)
        if machine is None:
            return None
        sandbox = self._new_sandbox(record.sandbox_id)
        sandbox.own(machine)
        self._sandboxes[record.sandbox_id] = sandbox
        _log.info("adopted a machine", sandbox=record.sandbox_id, machine=record.machine_id)
        return machine

    def _is_current(self, record: Record) -> bool:
        return record.boot_id == self._boot_id

    async def _take_stored(self, sandbox_id: SandboxId) -> None:
        """Take over what is stored of a sandbox, or tidy up behind one that runs."""
        paths = self._context.paths
        running = self._sandboxes.get(sandbox_id)
        if running is not None:
            record = running.machine.record
            await asyncio.to_thread(paused.settle, paths, sandbox_id, record.layers)
            if record.added_layers and record.layers:
                await asyncio.to_thread(paused.seclude_layer, paths, sandbox_id, record.layers[-1])
            return
        sandbox = self._new_sandbox(sandbox_id)
        try:
            complete = await asyncio.to_thread(paused.newest, paths, sandbox_id)
        except IncompatibleImage as error:
            _log.error("a stored sandbox cannot be read", sandbox=sandbox_id, detail=error.detail)
            sandbox.own_damaged(error)
            self._sandboxes[sandbox_id] = sandbox
            return
        if complete is None:
            await asyncio.to_thread(paused.keep, paths, sandbox_id, ())
            return
        sandbox.own_stored(complete)
        self._sandboxes[sandbox_id] = sandbox
        kept = {complete.generation, *complete.layers}
        await asyncio.to_thread(paused.keep, paths, sandbox_id, kept)
        await asyncio.to_thread(paused.strip, paths, sandbox_id, complete.layers)
        await asyncio.to_thread(paused.withdraw_disks, paths, sandbox_id, kept)


_ANOTHER: Final = (
    "The sandboxes and snapshots in this data directory belong to another database, and with this"
    " one they would all be destroyed. Start with the database that they belong to (DATABASE_URL),"
    " or choose another data directory (WRENN_DATA_DIR). To give them up, remove the file named"
    " owner in the data directory and start again"
)
_ELSEWHERE: Final = (
    "This database has sandboxes, and this data directory, which is another one than theirs, has"
    " none: they would all be taken for lost. Start with the data directory that they are in"
    " (WRENN_DATA_DIR), or choose another database (DATABASE_URL). If it is gone for good, put an"
    " empty file named owner into this one and start again"
)


def claim(paths: Paths, owner: str, *, in_use: bool, expected: bool) -> None:
    """Note `owner` for good; `Conflict` where another one's sandboxes or images are here.

    `in_use` says whether the host has any sandbox; one whose stored state cannot be read counts
    as well. With `expected` there must be some, or the directory must be known to `owner`: raises
    `Conflict` otherwise.
    """
    try:
        known = paths.owner.read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        known = None
    if known == owner:
        return
    in_use = in_use or bool(paused.all_ids(paths))
    if known and (in_use or any(paths.held.iterdir())):
        raise Conflict(_ANOTHER)
    if expected and not in_use and known != "":
        raise Conflict(_ELSEWHERE)
    if known:
        _log.warning("the data directory now belongs to another database", before=known, now=owner)
    write_durably(paths.owner, owner.encode())
