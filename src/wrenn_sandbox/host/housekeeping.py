"""What is done in the background so that stored sandboxes stay cheap.

Pages: a sandbox whose own pages outgrow a threshold gets a memory image of its own that holds
them, and its next pause writes what has changed since. Disks: layers that nothing writes to any
more are put together, while the sandbox runs or is stored. Both are made aside and take the
sandbox's lock only to be switched to; a sandbox that is resumed meanwhile does not wait. What was
stored of the memory of a sandbox that runs again is removed.
"""

import asyncio
import contextlib
import threading
from collections.abc import Collection
from typing import Final

import structlog

from wrenn_sandbox.aio import in_thread
from wrenn_sandbox.errors import Conflict, WrennError
from wrenn_sandbox.ids import SandboxId, new_image_id

from . import admission, failpoints, merging, paused
from .collection import ImageCollection
from .context import HostContext
from .images import manifest as form
from .memory import diff
from .paused import PausedSandbox
from .sandbox import Sandbox

_log = structlog.get_logger(__name__)

_ROUND_SEC: Final = 10.0
_LEAST_SHARE: Final = 16
"""Pages are merged when they are at least one part in so many of the guest's memory."""


class Housekeeper:
    """One worker for all sandboxes of a host, which does one thing at a time."""

    def __init__(self, context: HostContext, collection: ImageCollection) -> None:
        self._context = context
        self._settings = context.settings
        self._collection = collection
        self._sandboxes: Collection[Sandbox] = ()
        self._waiting: dict[SandboxId, Sandbox] = {}
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    def start(self, sandboxes: Collection[Sandbox]) -> None:
        """Begin to work, first on what there is; `sandboxes` changes as they come and go."""
        self._sandboxes = sandboxes
        for sandbox in sandboxes:
            self.consider(sandbox)
        self._worker = asyncio.create_task(self._work(), name="housekeeping")

    def consider(self, sandbox: Sandbox) -> None:
        """See soon whether there is something to do for a sandbox; harmless if there is not."""
        self._waiting[sandbox.sandbox_id] = sandbox
        self._settled.clear()
        self._wake.set()

    async def settled(self) -> None:
        """Wait until all that was asked for is done or put off."""
        await self._settled.wait()

    async def close(self) -> None:
        """Give up what is being done."""
        self._closing = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + _ROUND_SEC
        while not self._closing:
            if loop.time() >= due:
                await self._look_around()
                due = loop.time() + _ROUND_SEC
            if self._waiting:
                await self._tidy(self._waiting.pop(next(iter(self._waiting))))
                continue
            self._settled.set()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()

    async def _look_around(self) -> None:
        """What is due from time to time, however much there is to do for sandboxes."""
        try:
            await self._context.driver.tend(self._settings.idle_memory_sec)
        except (OSError, WrennError) as error:
            _log.warning("housekeeping failed", detail=str(error))

    async def _tidy(self, sandbox: Sandbox) -> None:
        log = _log.bind(sandbox=sandbox.sandbox_id)
        for chore in (self._strip, self._merge, self._collapse):
            try:
                await chore(sandbox)
            except Conflict as reason:
                log.info("housekeeping put off", reason=reason.message)
            except WrennError as error:
                log.warning("housekeeping failed", error=error.message, detail=error.detail)
            except OSError as error:
                log.warning("housekeeping failed", detail=str(error))
            except Exception:
                log.exception("housekeeping failed")

    async def _strip(self, sandbox: Sandbox) -> None:
        """Free what a resume has used up: the answer to it does not wait for that."""
        await asyncio.to_thread(
            paused.strip, self._context.paths, sandbox.sandbox_id, sandbox.layers
        )

    async def _merge(self, sandbox: Sandbox) -> None:
        manifest = sandbox.stored
        if manifest is None or not self._is_outgrown(manifest):
            return
        await self._require_space(manifest.machine.memory_mb)
        image_id = new_image_id(self._context.random)
        given_up = threading.Event()

        def check() -> None:
            if given_up.is_set() or sandbox.busy or sandbox.stored is not manifest:
                raise Conflict("The sandbox is wanted")

        def make() -> None:
            merging.make(self._context, manifest, image_id, check)

        async with self._collection.sparing(image_id):
            await in_thread(make, given_up)
            failpoints.reach("merge.published")
            if await sandbox.refer_to(image_id, instead_of=manifest):
                failpoints.reach("merge.switched")
                _log.info("merged own pages", sandbox=sandbox.sandbox_id, image=image_id)

    def _is_outgrown(self, manifest: PausedSandbox) -> bool:
        if manifest.stopped:
            return False
        least_mb = max(self._settings.merge_diff_mb, manifest.machine.memory_mb // _LEAST_SHARE)
        return manifest.files[diff.PAGES].size >= least_mb << 20

    async def _collapse(self, sandbox: Sandbox) -> None:
        """Put one layer in the place of all that no machine writes to."""
        chain, image_id = sandbox.layers, sandbox.image_id
        if image_id is None or not chain:
            return
        paths, store = self._context.paths, self._context.store
        disks = [paths.generation(sandbox.sandbox_id, each) / form.DISK for each in chain]
        image = await asyncio.to_thread(store.open, image_id)
        grown = await asyncio.to_thread(sandbox.disk_layers, image.disk_mb)
        few = len(chain) <= self._settings.max_disk_layers
        if few and not grown.is_outgrown(self._settings.disk_factor):
            return
        await self._require_space(min(grown.older >> 20, image.disk_mb))
        given_up = threading.Event()

        def check() -> None:
            if given_up.is_set():
                raise Conflict("The host is stopping")

        with store.staging() as directory:
            made = directory / form.DISK

            def make() -> None:
                disk_format = self._context.driver.disk_format
                disk_format.merge(disks, made, store.below(image), image.disk_size, check)

            await in_thread(make, given_up)
            failpoints.reach("collapse.made")
            if await sandbox.replace_layers(chain, made):
                _log.info("collapsed disk layers", sandbox=sandbox.sandbox_id, count=len(chain))

    async def _require_space(self, needed_mb: int) -> None:
        free = await asyncio.to_thread(admission.measure, self._context.paths.data_dir)
        if free.disk_free_mb - needed_mb < self._settings.disk_reserve_mb:
            raise Conflict("There is no disk space to spare")
