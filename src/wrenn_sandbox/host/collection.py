"""Removing the images that nobody needs, and never one that somebody is about to need."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.vmm.base import Driver
from wrenn_sandbox.ids import ImageId

from .images import manifest as form
from .paths import Paths


class ImageCollection:
    """`needed` gives the images of all sandboxes and machines, or None while that is unknown."""

    def __init__(
        self,
        paths: Paths,
        store: ImageStore,
        driver: Driver,
        needed: Callable[[], Collection[ImageId] | None],
        *,
        variants: int | None = None,
    ) -> None:
        self._paths = paths
        self._store = store
        self._driver = driver
        self._needed = needed
        self._variants = variants
        self._spared: set[ImageId] = set()
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Remove what neither a sandbox nor a name needs, and what is kept in memory of it."""
        async with self._lock:
            needed = self._needed()
            if needed is not None:
                await asyncio.to_thread(self._run, {*needed, *self._spared})

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

    def _run(self, needed: Collection[ImageId]) -> None:
        for image_id in self._store.collect(needed, variants=self._variants):
            self._driver.forget(self._paths.image(image_id) / form.MEMORY)
