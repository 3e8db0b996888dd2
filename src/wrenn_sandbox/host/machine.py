"""One running machine, from its launch to its end.

Each step that takes something pushes its undo; success takes the undo steps away, failure and
cancellation run them backwards. The journal says at each point what a later server has to adopt
or to reclaim.
"""

import asyncio
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Self

import msgspec
import structlog

from wrenn_sandbox.aio import first_of, in_thread, shielded
from wrenn_sandbox.errors import AgentError, HostFailure, NotFound, WrennError
from wrenn_sandbox.host.images.manifest import FileDigest
from wrenn_sandbox.host.vmm.base import MachineSpec, Process
from wrenn_sandbox.ids import new_machine_id
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import Egress, Phase, Placement

from . import admission, failpoints, journal
from .context import HostContext
from .disk.base import Disk
from .guest import (
    GuestClient,
    GuestUnreachable,
    Initialisation,
    Limits,
    RunningGuest,
    encoded_entropy,
)
from .history.log import SandboxLog
from .journal import Record
from .launch_source import LaunchSource, spec_of
from .paths import PASSAGE_DIRECTORY, MachineFiles
from .slot import Slot
from .stages import stage

_log = structlog.get_logger(__name__)

BOOT_ATTEMPT_SEC: Final = 0.25
RETRY_SEC: Final = 0.01
CLOCK_PRECISION_SEC: Final = 0.03
ENTROPY_BYTES: Final = 64
TOKEN_BYTES: Final = 24
LISTEN_SEC: Final = 0.5
"""How often a console is read at most, however many ask for it."""


class Machine:
    """A machine with its directory, slot and process. `on_exit` is told when it ends by itself."""

    def __init__(
        self, context: HostContext, record: Record, spec: MachineSpec, token: str | None
    ) -> None:
        self._context = context
        self._record = record
        self._spec = spec
        self._token = token
        self._client: GuestClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._clock_setter: asyncio.Task[None] | None = None
        self._ca: str | None = None
        """The authority that the guest trusts for its secrets; None while that is not known."""
        self._listening = asyncio.Lock()
        self._listened = -math.inf
        self.on_exit: Callable[[str], None] | None = None
        self.log: SandboxLog | None = None
        """Where its console is kept, once it is a sandbox's."""
        self.ended: str | None = None
        """Why the machine ended by itself, once it has."""

    @property
    def record(self) -> Record:
        return self._record

    @property
    def spec(self) -> MachineSpec:
        return self._spec

    @property
    def process(self) -> Process:
        if self._record.process is None:
            raise HostFailure("The machine is not started")
        return self._record.process

    @property
    def client(self) -> GuestClient:
        """Calls to the guest; raises `NotFound` while it does not run."""
        if self._client is None:
            raise NotFound("The sandbox is not running")
        return self._client

    @property
    def guest(self) -> RunningGuest:
        """Calls into the guest; raises `NotFound` while it does not run."""
        denials = partial(self._context.slots.denials, self._spec.slot)
        return RunningGuest(self.client, denials)

    @property
    def placement(self) -> Placement:
        slot = self._spec.slot
        return Placement(
            guest_ip=slot.guest_ip, host_ip=slot.host_ip, rebooted=self._record.rebooted
        )

    @property
    def network(self) -> Egress | None:
        """What the guest may reach; None where that is not known for certain."""
        policy = self._context.slots.applied(self._spec.slot)
        return None if policy is None else Egress.of(policy)

    @property
    def injection(self) -> str | None:
        """The version of what the rules for secrets are followed with; None without."""
        policy = self._context.slots.applied(self._spec.slot)
        injection = None if policy is None else policy.injection
        return None if injection is None else injection.version

    @classmethod
    async def boot(
        cls,
        context: HostContext,
        source: LaunchSource,
        record: str,
        before: Callable[[Slot], None] | None = None,
    ) -> Self:
        """Boot a machine whose memory is in the file `record` of its directory.

        `before` as in `restore`. Raises as that does; nothing is left then.
        """

        async def boot(spec: MachineSpec) -> Process:
            return await context.driver.boot(spec, record=spec.files.directory / record)

        return await cls._launch(context, source, before, boot)

    @classmethod
    async def restore(
        cls,
        context: HostContext,
        source: LaunchSource,
        before: Callable[[Slot], None] | None = None,
    ) -> Self:
        """A machine that continues the source's snapshot.

        `before` is called in a thread when the slot is known. Raises OSError, `HostFailure`, and
        `NoCapacity` where its disk has no room; nothing is left then.
        """
        snapshot = source.snapshot
        assert snapshot is not None
        return await cls._launch(
            context, source, before, lambda spec: context.driver.restore(spec, snapshot)
        )

    @classmethod
    async def _launch(
        cls,
        context: HostContext,
        source: LaunchSource,
        before: Callable[[Slot], None] | None,
        start: Callable[[MachineSpec], Awaitable[Process]],
    ) -> Self:
        async with AsyncExitStack() as undo:
            machine = await cls._prepared(context, source, undo)
            if before is not None:
                await asyncio.to_thread(before, machine.spec.slot)
            with stage("boot" if source.snapshot is None else "restore"):
                process = await start(machine.spec)
            undo.push_async_callback(context.driver.kill, process)
            failpoints.reach("machine.started")
            machine.note(process=process)
            failpoints.reach("machine.noted")
            machine._watch()
            undo.pop_all()
        return machine

    @classmethod
    async def _prepared(
        cls, context: HostContext, source: LaunchSource, undo: AsyncExitStack
    ) -> Self:
        with stage("slot"):
            slot = await context.slots.acquire()
        undo.callback(context.slots.release, slot)
        failpoints.reach("machine.slot")
        record = Record(
            machine_id=new_machine_id(context.random),
            image_id=source.image.image_id,
            vcpus=source.vcpus,
            memory_mb=source.memory_mb,
            driver=context.driver.capabilities.name,
            boot_id=journal.boot_id(),
            slot=slot,
            generation=source.generation,
            layers=source.layers,
            rebooted=source.rebooted,
            engine=source.engine or context.driver.capabilities.engine,
        )
        spec = await asyncio.to_thread(spec_of, context, record)
        memory = None if source.snapshot is None else spec.memory
        spec = replace(spec, memory=memory, disks=(*spec.disks, *source.stored_disks))
        machine = cls(context, record, spec, source.token)
        undo.callback(machine._forget)
        given_up = threading.Event()
        with stage("disk"):
            await in_thread(partial(machine._make_directory, source, given_up), given_up)
        failpoints.reach("machine.directory")
        return machine

    def _make_directory(self, source: LaunchSource, given_up: threading.Event) -> None:
        """The machine's directory with its journal and disk; blocks, no longer than it is wanted.

        The disk alone is the slot's user's: in a directory of its own a captured monitor could put
        links and journals of its making before the server.
        """

        def check() -> None:
            if given_up.is_set():
                raise HostFailure("The start was given up")

        files = self._spec.files
        files.directory.mkdir(mode=PASSAGE_DIRECTORY)
        self.note()
        size = source.image.disk_mb << 20
        room = partial(admission.require_room, self._context.settings)
        self._context.driver.disk_format.create(files.overlay, source.disk, size, check, room)
        self._hand_over(files.overlay)

    def _hand_over(self, layer: Path) -> None:
        if os.geteuid() == 0:
            os.chown(layer, self._spec.slot.uid, self._spec.slot.uid)

    @classmethod
    async def adopt(cls, context: HostContext, record: Record) -> Self | None:
        """Take over a machine that an earlier server launched; None where it is gone."""
        if record.process is None or record.phase is not Phase.RUNNING:
            return None
        try:
            spec = await asyncio.to_thread(spec_of, context, record)
        except (OSError, WrennError) as error:
            _log.warning("machine without image", machine=record.machine_id, detail=str(error))
            return None
        if not await context.driver.adopt(record.process, spec):
            return None
        machine = cls(context, record, spec, record.token)
        if not record.network.secrets:
            machine._ca = ""
        try:
            await machine._find_layer()
        except (OSError, WrennError) as error:
            _log.warning("machine of unknown disk", machine=record.machine_id, detail=str(error))
            return None
        machine._reach_again()
        machine._watch()
        return machine

    async def initialize_guest(self, hostname: str, envs: dict[str, str] | None = None) -> None:
        """Wait for the agent and give the guest its identity, clock, entropy and a new token.

        New commands find `envs` in their environment; without any, those that others found before.
        May be repeated: the guest then is somebody else's. Fails at once when the machine ends.
        Raises `HostFailure`.
        """
        began = time.monotonic()
        self._drop_client()
        with stage("init"):
            self._client = await self._unless_ended(self._initialize_guest(hostname, envs))
        if time.monotonic() - began > CLOCK_PRECISION_SEC:
            self._correct_clock(self._client)

    def _correct_clock(self, client: GuestClient) -> None:
        """Set the guest's clock beside all else: it has stood still, or may have."""
        if self._clock_setter is not None:
            self._clock_setter.cancel()
        self._clock_setter = asyncio.create_task(self._set_clock(client))

    async def _set_clock(self, client: GuestClient) -> None:
        """Tell the guest the time again, now that an answer takes no longer than it should."""
        try:
            async with asyncio.timeout(patience(self._context.settings.boot_timeout_sec)):
                await client.set_clock(self._token or "", self._context.clock().isoformat())
        except (TimeoutError, WrennError) as error:
            _log.warning("the guest's clock may be late", detail=str(error))

    async def open_network(self, policy: NetworkPolicy) -> None:
        """Let a guest that reaches nothing yet reach what the policy says. Raises `HostFailure`.

        The next `note` writes it down.
        """
        with stage("network"):
            await self._context.slots.apply(self._spec.slot, policy)
        self._ca = "" if policy.injection is None else policy.injection.ca
        self._record = msgspec.structs.replace(self._record, network=Egress.of(policy))

    async def set_network(self, policy: NetworkPolicy) -> None:
        """Let the guest reach what the policy says from now on. Raises `HostFailure`.

        The policy holds also where the guest does not take the authority that it is to trust.
        """
        before = self._ca
        await self.open_network(policy)
        self.note()
        if self._ca != before:
            await self._tell_authority(self._ca or "")

    async def _tell_authority(self, ca: str) -> None:
        limit = patience(self._context.settings.boot_timeout_sec)
        try:
            async with asyncio.timeout(limit):
                await self.client.trust(self._token or "", ca)
        except (TimeoutError, WrennError) as error:
            self._ca = None
            raise HostFailure(
                "The network policy holds, but the sandbox did not take the certificate authority"
                " of its secrets; set the policy again",
                detail=str(error),
            ) from error

    async def _unless_ended(self, work: Coroutine[None, None, GuestClient]) -> GuestClient:
        assert self._watcher is not None
        try:
            async with first_of(work, asyncio.shield(self._watcher)) as (task, _):
                if not task.done():
                    raise HostFailure("The sandbox ended while it started", detail=self.ended)
                return task.result()
        except WrennError as error:
            error.add_detail(await self._context.driver.diagnosis(self.process))
            raise

    async def _initialize_guest(self, hostname: str, envs: dict[str, str] | None) -> GuestClient:
        token = self._context.random(TOKEN_BYTES).hex()
        client = self._new_client(self._token)
        limit = patience(self._context.settings.boot_timeout_sec)
        try:
            async with asyncio.timeout(limit):
                if self._spec.memory is None:
                    await _until_healthy(client)
                self.note(token=token)
                await self._initialise(client, hostname, token, envs)
        except TimeoutError as error:
            client.close()
            late = f"no answer of the guest agent within {limit:g} s"
            raise HostFailure("The sandbox did not answer in time", detail=late) from error
        except BaseException:
            client.close()
            raise
        self._token = token
        return client

    async def _initialise(
        self, client: GuestClient, hostname: str, token: str, envs: dict[str, str] | None
    ) -> None:
        while True:
            try:
                return await client.init(self._initialisation(hostname, token, envs))
            except GuestUnreachable:
                await asyncio.sleep(RETRY_SEC)

    async def store(self, into: Path) -> dict[str, FileDigest]:
        """Stop the machine and write its state to `into`; it stays stopped.

        Returns what was written. The guest's connections are dropped. On failure it runs on.
        """
        self._drop_client()
        try:
            return await self._context.driver.pause(self.process, self._spec, into)
        except BaseException:
            self._reach_again()
            raise

    async def run_on(self) -> None:
        """Let a machine that was stored run on. Raises `HostFailure` where it is gone."""
        await self._context.driver.unpause(self.process, self._spec)
        self._reach_again()

    @asynccontextmanager
    async def standing_still(self, into: Path) -> AsyncIterator[dict[str, FileDigest]]:
        """Write the machine's state to `into`, and let it run on when the block is left.

        Gives what was written. The guest's connections stay; its clock is set afterwards. Raises
        `HostFailure`.
        """
        files = await self._context.driver.pause(self.process, self._spec, into)
        try:
            yield files
        finally:
            await shielded(self._context.driver.unpause(self.process, self._spec))
            if self._client is not None:
                self._correct_clock(self._client)

    async def add_layer(self, generation: int, below: Path, size: int) -> None:
        """Have a stopped machine write to a new disk layer over that of a generation, `below`.

        The disk has `size` bytes. Not to be cancelled. Raises OSError and `HostFailure`: the
        machine writes to the old layer still, or is lost to this server.
        """
        context, above = self._context, self._spec.files.above(generation)
        layer = above.overlay
        try:
            await asyncio.to_thread(self._make_layer, layer, below, size)
            await context.driver.add_layer(self.process, self._spec, layer)
        except (OSError, HostFailure):
            if not await context.driver.writes_to(self.process, layer):
                layer.unlink(missing_ok=True)
                raise
        failpoints.reach("layer.added")
        self._note_layer(generation)
        failpoints.reach("layer.noted")

    def _make_layer(self, layer: Path, below: Path, size: int) -> None:
        layer.unlink(missing_ok=True)
        self._context.driver.disk_format.create(layer, Disk(below, raw=False), size)
        self._hand_over(layer)

    def _note_layer(self, generation: int) -> None:
        old, files = self._spec.files, self._spec.files.above(generation)
        self._spec = replace(self._spec, files=files)
        self.note(
            generation=generation,
            layers=(*self._record.layers, generation),
            disk=files.disk,
            added_layers=self._record.added_layers + 1,
        )
        old.overlay.unlink()

    async def _find_layer(self) -> None:
        """Note a layer that was added by a server which did not live to note it.

        What is there besides is removed: a layer that was not added, or the name of an old one.
        """
        generation = self._record.generation + 1
        layer = self._spec.files.above(generation).overlay
        if layer.exists() and await self._context.driver.writes_to(self.process, layer):
            self._note_layer(generation)
        directory = self._spec.files.directory
        found = {*directory.glob("disk-*"), directory / MachineFiles(directory).disk}
        for other in found - {self._spec.files.overlay}:
            other.unlink(missing_ok=True)

    async def keep_log(self, *, ended: bool = False) -> None:
        """Move what the guest has written to its console to the sandbox's log."""
        await shielded(self._keep_log(ended))

    async def _keep_log(self, ended: bool) -> None:
        if self.log is None or self._record.process is None:
            return
        async with self._listening:
            if not ended and time.monotonic() - self._listened < LISTEN_SEC:
                return
            self._listened = time.monotonic()
            text = await self._context.driver.console(self._record.process)
            add = partial(self.log.add, text, self._context.clock(), ended=ended)
            try:
                await asyncio.to_thread(add)
            except OSError as error:
                _log.warning("a console is not kept", detail=str(error))

    async def end(self) -> None:
        """End the machine; its files stay until `release`. Safe to repeat."""
        await self._stop_watching()
        self._drop_client()
        if self._record.process is not None:
            try:
                await self.keep_log(ended=True)
            finally:
                await self._context.driver.kill(self._record.process)

    async def release(self) -> None:
        """End the machine and free all it has; safe to repeat."""
        await self.end()
        self._context.slots.release(self._spec.slot)
        await asyncio.to_thread(self._forget)

    async def detach(self) -> None:
        """Let go of a machine that runs on without this server."""
        await self._stop_watching()
        self._drop_client()

    def note(self, **changes: object) -> None:
        """Write the record with these changes."""
        self._record = msgspec.structs.replace(self._record, **changes)
        journal.write(self._spec.files.journal, self._record)

    def _initialisation(
        self, hostname: str, token: str, envs: dict[str, str] | None
    ) -> Initialisation:
        random = self._context.random
        return Initialisation(
            access_token=token,
            timestamp=self._context.clock().isoformat(),
            entropy=encoded_entropy(random(ENTROPY_BYTES)),
            hostname=hostname,
            machine_id=_machine_id_of(hostname),
            generation=random(8).hex(),
            limits=Limits(
                processes=self._context.settings.guest_processes,
                reserved_memory=self._context.settings.guest_reserved_mb << 20,
            ),
            env_vars=envs,
            trusted_ca=self._ca or "",
        )

    def _new_client(self, token: str | None) -> GuestClient:
        slot, connect = self._spec.slot, self._context.connect
        to_port = None if slot.netns is None else partial(connect, slot)
        return GuestClient(lambda: connect(slot), token, to_port)

    def _reach_again(self) -> None:
        """Make calls to a guest possible that runs on, and set its clock."""
        self._client = self._new_client(self._token)
        self._correct_clock(self._client)

    def _drop_client(self) -> None:
        if self._clock_setter is not None:
            self._clock_setter.cancel()
            self._clock_setter = None
        if self._client is not None:
            self._client.close()
            self._client = None

    def _forget(self) -> None:
        shutil.rmtree(self._spec.files.directory, ignore_errors=True)

    def _watch(self) -> None:
        name = f"watch {self._record.machine_id}"
        self._watcher = asyncio.create_task(self._until_exit(), name=name)

    async def _until_exit(self) -> None:
        reason = await self._context.driver.wait(self.process)
        found = await self._context.driver.diagnosis(self.process)
        _log.warning(
            "machine ended",
            sandbox=self._record.sandbox_id,
            machine=self._record.machine_id,
            reason=reason,
            detail=found[-2000:],
        )
        self._drop_client()
        self.ended = reason
        if self.on_exit is not None:
            self.on_exit(reason)

    async def _stop_watching(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
            await asyncio.wait([watcher])


def _machine_id_of(hostname: str) -> str:
    """Its machine id: a sandbox keeps its own over all its machines, and no other one has it."""
    return hashlib.sha256(f"machine-id {hostname}".encode()).hexdigest()[:32]


async def _until_healthy(client: GuestClient) -> None:
    while True:
        try:
            async with asyncio.timeout(patience(BOOT_ATTEMPT_SEC)):
                return await client.health()
        except (TimeoutError, AgentError):
            await asyncio.sleep(RETRY_SEC)
