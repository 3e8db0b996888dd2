"""Images that no template names any more, given up at the host."""

from datetime import datetime, timedelta
from typing import Final

import structlog

from wrenn_sandbox.control.store import Store
from wrenn_sandbox.errors import NotFound, WrennError
from wrenn_sandbox.ids import ImageId
from wrenn_sandbox.wire.host import Host

_log = structlog.get_logger(__name__)

GRACE: Final = timedelta(minutes=10)
"""How old an image must be before it counts that nobody knows of it."""


class DiscardedImages:
    def __init__(self, store: Store, host: Host) -> None:
        self._store = store.snapshots
        self._host = host

    async def remove(self) -> None:
        """Remove what can be removed now; the rest stays noted for the next time."""
        done = [each for each in await self._store.discarded() if await self._give_up(each)]
        if done:
            await self._store.forget_discarded(done)

    async def remove_unknown(self, now: datetime) -> None:
        """Remove what the host holds and no template, snapshot under way or note knows.

        A server that was killed after the host had made an image may have left one. The host is
        asked first: whatever it held then was known then, unless it was given up since.
        """
        held = await self._host.held_images()
        if not held:
            return
        known = await self._store.known_images()
        for image in held:
            if image.image_id not in known and image.created_at < now - GRACE:
                _log.warning("releasing an unknown image", image_id=image.image_id)
                await self._give_up(image.image_id)

    async def _give_up(self, image_id: ImageId) -> bool:
        try:
            await self._host.remove_image(image_id)
        except NotFound:
            return True
        except WrennError as error:
            _log.warning("image not removed", image_id=image_id, error=error.message)
            return False
        return True
