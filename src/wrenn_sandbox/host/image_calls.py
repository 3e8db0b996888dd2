"""The calls of the Host interface about images: templates, and what was made of sandboxes."""

import asyncio
from contextlib import suppress

from wrenn_sandbox.errors import IncompatibleImage, NotFound
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.ids import ImageId
from wrenn_sandbox.model.template import Size
from wrenn_sandbox.wire.messages import BaseTemplate, CreateSandbox, ImageInfo

from .collection import ImageCollection
from .variants import Variants


class ImageCalls:
    """Whoever inherits brings the context."""

    _store: ImageStore
    _variants: Variants
    _collection: ImageCollection

    async def templates(self) -> list[BaseTemplate]:
        found = await asyncio.to_thread(self._store.templates)
        return [
            BaseTemplate(
                name=template.name,
                image_id=template.manifest.image_id,
                vcpus=template.manifest.vcpus,
                memory_mb=template.manifest.memory_mb,
                size=template.size,
                created_at=template.manifest.created_at,
            )
            for template in found
        ]

    async def warm(self, template: str) -> None:
        """Make the snapshot of a template for its own size, unless it is there.

        Raises `NotFound` and `HostFailure`.
        """
        image = await asyncio.to_thread(self._store.resolve, template)
        await self._variants.get(image, Size(image.vcpus, image.memory_mb))

    async def _startable(self, request: CreateSandbox) -> Manifest:
        """The snapshot to continue: the image itself, or a template's for the size."""
        image = await asyncio.to_thread(self._store.open, request.image_id)
        if not image.is_cold:
            return await asyncio.to_thread(self._store.open_sound, request.image_id)
        return await self._variants.get(image, Size(request.vcpus, request.memory_mb))

    async def _image_info(self, image_id: ImageId) -> ImageInfo:
        image = await asyncio.to_thread(self._store.open, image_id)
        return ImageInfo(
            image_id=image_id,
            vcpus=image.vcpus,
            memory_mb=image.memory_mb,
            size=await asyncio.to_thread(self._store.size, image_id),
            created_at=image.created_at,
        )

    async def remove_image(self, image_id: ImageId) -> None:
        await asyncio.to_thread(self._store.let_go, image_id)
        await self._collection.run()

    async def held_images(self) -> list[ImageInfo]:
        found = []
        for image_id in await asyncio.to_thread(self._store.held):
            with suppress(NotFound, IncompatibleImage):
                found.append(await self._image_info(image_id))
        return found
