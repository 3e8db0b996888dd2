"""Removing the images and engines that nobody needs, and never one that is about to be needed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from wrenn_sandbox.errors import IncompatibleImage, NotFound
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.images.manifest import HardwareProfile
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.ids import ImageId

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class EngineNeeds:
    """What sandboxes need of engines: those that VMs run on, what is stored, and what VMs start
    from or have started from; they may store the same again.
    """

    running: Collection[str] = ()
    stored: Collection[HardwareProfile] = ()
    images: Collection[ImageId] = ()


class ImageCollection:
    """`needed` gives the images of all sandboxes and machines, or None while that is unknown.

    `engine` is the host's own: it is kept, and of the variants only those that it has made.
    """

    def __init__(
        self,
        store: ImageStore,
        needed: Callable[[], Collection[ImageId] | None],
        engines: EngineStore,
        needed_engines: Callable[[], EngineNeeds] = EngineNeeds,
        *,
        engine: str = "",
        variants: int | None = None,
    ) -> None:
        self._store = store
        self._needed = needed
        self._engines = engines
        self._needed_engines = needed_engines
        self._engine = engine
        self._variants = variants
        self._spared: set[ImageId] = set()
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Remove what neither a sandbox nor a name needs."""
        async with self._lock:
            needed = self._needed()
            if needed is not None:
                wanted = {*needed, *self._spared}
                await asyncio.to_thread(self._collect, wanted, self._needed_engines())

    def _collect(self, wanted: Collection[ImageId], needs: EngineNeeds) -> None:
        self._store.collect(wanted, variants=self._variants, engine=self._engine or None)
        if not self._engines.are_several:
            return
        try:
            images = self._store.machines({*self._store.held(), *needs.images})
            needed = self._engines.needed_by([*needs.stored, *images])
            gone = self._engines.collect({self._engine, *needs.running, *needed})
        except (IncompatibleImage, NotFound, OSError) as error:
            _log.warning("no engine is removed", detail=str(error))
            return
        if gone:
            _log.info("removed engines that nothing needs", engines=sorted(gone))

    @asynccontextmanager
    async def sparing(self, image_id: ImageId) -> AsyncIterator[None]:
        """Keep an image, made or yet to be, until the end of the block; then collect."""
        async with self._lock:
            self._spared.add(image_id)
        try:
            yield
        finally:
            self._spared.discard(image_id)
            await self.run()
