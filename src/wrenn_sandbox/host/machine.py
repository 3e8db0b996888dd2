"""One machine of one sandbox, from its start to its end, read top to bottom.

A machine does one thing at a time. Each step that takes something pushes its undo; success takes
the undo steps away, failure and cancellation run them backwards. The journal says at each point
what a later server has to adopt or to reclaim.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import msgspec
import structlog

from wrenn_sandbox.errors import AgentError, Conflict, HostFailure, NoCapacity, NotFound, WrennError
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.disk import overlay
from wrenn_sandbox.host.guest import GuestClient, Initialisation, encoded_entropy
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.network.slot import Slot, SlotSource
from wrenn_sandbox.host.paths import PASSAGE_DIRECTORY, Paths
from wrenn_sandbox.host.vmm.base import Driver, MachineSpec, Process
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Phase, Placement

_log = structlog.get_logger(__name__)

BOOT_ATTEMPT_SEC: Final = 0.25
RETRY_SEC: Final = 0.01
ENTROPY_BYTES: Final = 64
TOKEN_BYTES: Final = 24
NO_SPACE: Final = "The host has no disk space left for another sandbox."


@dataclass(frozen=True)
class Parts:
    """What every machine of a host shares."""

    settings: Settings
    paths: Paths
    store: ImageStore
    driver: Driver
    slots: SlotSource
    connect: Callable[[Slot], Awaitable[socket.socket]]
    clock: Callable[[], datetime]
    random: Callable[[int], bytes]
    on_exit: Callable[["Machine", str], None]


class Machine:
    """The actor. Lifecycle methods raise `WrennError` and leave nothing half done."""

    def __init__(self, parts: Parts, record: Record) -> None:
        self._parts = parts
        self._record = record
        self._files = parts.paths.sandbox(record.sandbox_id)
        self._lock = asyncio.Lock()
        self._operation: asyncio.Task[object] | None = None
        self._client: GuestClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    @property
    def record(self) -> Record:
        return self._record

    @property
    def busy(self) -> bool:
        """Whether an operation is under way."""
        return self._lock.locked()

    @property
    def client(self) -> GuestClient:
        """Calls to the guest; raises `NotFound` while it does not run."""
        if self._client is None:
            raise NotFound("The sandbox is not running.")
        return self._client

    @property
    def placement(self) -> Placement:
        slot = self._record.slot
        if slot is None:
            raise NotFound("The sandbox is not running.")
        return Placement(guest_ip=slot.guest_ip, host_ip=slot.host_ip)

    async def start(self) -> Placement:
        """Start the machine from its image and wait until its agent has answered."""
        with _translated():
            return await self._start()

    async def _start(self) -> Placement:
        async with self._exclusive():
            image = await asyncio.to_thread(self._parts.store.open, self._record.image_id)
            async with AsyncExitStack() as undo:
                slot = await self._parts.slots.acquire()
                undo.callback(self._parts.slots.release, slot)
                self._note(slot=slot)
                undo.callback(self._forget)
                spec = await asyncio.to_thread(self._prepare, image, slot)
                process = await self._parts.driver.boot(spec)
                undo.push_async_callback(self._parts.driver.kill, process)
                self._note(process=process)
                try:
                    client = await self._greet(slot, process)
                except WrennError as error:
                    error.detail = await self._diagnosis(error, process)
                    raise
                self._client = client
                self._note(phase=Phase.RUNNING, started_at=self._parts.clock())
                undo.pop_all()
            self._watch(process)
            return self.placement

    async def adopt(self) -> bool:
        """Take over a machine that an earlier server started; False where it is lost."""
        async with self._exclusive():
            record = self._record
            if record.process is None or record.slot is None or record.phase is not Phase.RUNNING:
                return False
            image = await asyncio.to_thread(self._parts.store.open, record.image_id)
            spec = self._spec(image, record.slot)
            if not await self._parts.driver.adopt(record.process, spec):
                return False
            self._client = self._new_client(record.slot, record.token)
            self._watch(record.process)
            return True

    async def answers(self) -> bool:
        """Whether the guest's agent answers."""
        try:
            async with asyncio.timeout(self._parts.settings.boot_timeout_sec):
                await self.client.health()
        except (TimeoutError, WrennError):
            return False
        return True

    async def destroy(self) -> None:
        """End the machine and free all it has, whatever it is doing; safe to repeat."""
        if self._operation is not None:
            self._operation.cancel()
        async with self._lock:
            self._gone = True
            await self._release()

    async def detach(self) -> None:
        """Let go of a machine that runs on without this server."""
        if self._operation is not None:
            self._operation.cancel()
        async with self._lock:
            await self._stop_watching()
            self._drop_client()

    # Steps

    def _prepare(self, image: Manifest, slot: Slot) -> MachineSpec:
        """Make the machine's directory and disk, owned by the slot's user; blocks."""
        spec = self._spec(image, slot)
        overlay.create(
            spec.files.overlay,
            backing=self._parts.store.disk(image),
            backing_format=image.disk_format,
            size=image.disk_mb << 20,
        )
        if os.geteuid() == 0:
            os.chown(spec.files.directory, slot.uid, slot.uid)
            os.chown(spec.files.overlay, slot.uid, slot.uid)
        return spec

    def _spec(self, image: Manifest, slot: Slot) -> MachineSpec:
        boot = self._parts.store.boot_files(image)
        return MachineSpec(
            files=self._files,
            slot=slot,
            vcpus=self._record.vcpus,
            memory_mb=self._record.memory_mb,
            kernel=boot.kernel,
            initrd=boot.initrd,
            kernel_args=boot.kernel_args,
            runtime=boot.runtime,
        )

    async def _greet(self, slot: Slot, process: Process) -> GuestClient:
        """Wait for the agent, then give it its identity. Fails at once when the machine ends."""
        ended = asyncio.create_task(self._parts.driver.wait(process))
        greeting = asyncio.create_task(self._until_answered(slot))
        try:
            await asyncio.wait({ended, greeting}, return_when=asyncio.FIRST_COMPLETED)
            if not greeting.done():
                raise HostFailure("The sandbox ended while it started.", detail=ended.result())
            return greeting.result()
        finally:
            for task in (ended, greeting):
                task.cancel()
            await asyncio.gather(ended, greeting, return_exceptions=True)

    async def _until_answered(self, slot: Slot) -> GuestClient:
        token = self._parts.random(TOKEN_BYTES).hex()
        client = self._new_client(slot, self._record.token or None)
        try:
            async with asyncio.timeout(self._parts.settings.boot_timeout_sec):
                while True:
                    try:
                        async with asyncio.timeout(BOOT_ATTEMPT_SEC):
                            await client.health()
                        break
                    except (TimeoutError, AgentError):
                        await asyncio.sleep(RETRY_SEC)
                self._note(token=token)
                await client.init(self._initialisation(token))
        except TimeoutError as error:
            client.close()
            raise HostFailure("The sandbox did not answer in time.") from error
        except BaseException:
            client.close()
            raise
        return client

    def _initialisation(self, token: str) -> Initialisation:
        random = self._parts.random
        return Initialisation(
            access_token=token,
            timestamp=self._parts.clock().isoformat(),
            entropy=encoded_entropy(random(ENTROPY_BYTES)),
            hostname=self._record.sandbox_id,
            machine_id=random(16).hex(),
            generation=random(8).hex(),
        )

    def _new_client(self, slot: Slot, token: str | None) -> GuestClient:
        return GuestClient(lambda: self._parts.connect(slot), token)

    async def _release(self) -> None:
        """Free everything the machine has; safe to repeat."""
        await self._stop_watching()
        self._drop_client()
        if self._record.process is not None:
            await self._parts.driver.kill(self._record.process)
        if self._record.slot is not None:
            self._parts.slots.release(self._record.slot)
        await asyncio.to_thread(self._forget)
        self._record = msgspec.structs.replace(self._record, process=None, slot=None)

    def _note(self, **changes: object) -> None:
        """Write the record with these changes."""
        self._record = msgspec.structs.replace(self._record, **changes)
        self._files.directory.mkdir(mode=PASSAGE_DIRECTORY, exist_ok=True)
        journal.write(self._files.journal, self._record)

    def _forget(self) -> None:
        """Remove the machine's directory and with it its record."""
        shutil.rmtree(self._files.directory, ignore_errors=True)

    async def _diagnosis(self, error: WrennError, process: Process) -> str:
        found = await self._parts.driver.diagnosis(process)
        return "\n".join(part for part in (error.detail, found) if part)

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # The machine's end

    def _watch(self, process: Process) -> None:
        self._watcher = asyncio.create_task(
            self._until_exit(process), name=f"watch {self._record.sandbox_id}"
        )

    async def _until_exit(self, process: Process) -> None:
        reason = await self._parts.driver.wait(process)
        found = await self._parts.driver.diagnosis(process)
        _log.warning(
            "machine ended", sandbox=self._record.sandbox_id, reason=reason, detail=found[-2000:]
        )
        self._watcher = None
        self._drop_client()
        async with self._lock:
            if not self._gone:
                await self._release()
                self._gone = True
        self._parts.on_exit(self, reason)

    async def _stop_watching(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
            await asyncio.wait([watcher])

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One operation at a time; `destroy` cancels the one under way."""
        async with self._lock:
            if self._gone:
                raise Conflict("The sandbox is gone.")
            self._operation = asyncio.current_task()
            try:
                yield
            finally:
                self._operation = None


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Failures of files and disks as the platform's own errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoCapacity(NO_SPACE, detail=str(error)) from error
        raise HostFailure("The host could not prepare the sandbox.", detail=str(error)) from error
