"""Removing the images that nobody needs, and never one that somebody is about to need."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.ids import ImageId


class ImageCollection:
    """`needed` gives the images of all sandboxes and machines, or None while that is unknown."""

    def __init__(
        self,
        store: ImageStore,
        needed: Callable[[], Collection[ImageId] | None],
        *,
        variants: int | None = None,
    ) -> None:
        self._store = store
        self._needed = needed
        self._variants = variants
        self._spared: set[ImageId] = set()
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Remove what neither a sandbox nor a name needs."""
        async with self._lock:
            needed = self._needed()
            if needed is not None:
                wanted = {*needed, *self._spared}
                await asyncio.to_thread(self._store.collect, wanted, variants=self._variants)

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
