"""Images that no template names any more, given up at the host."""

import structlog

from wrenn_sandbox.control.store import Store
from wrenn_sandbox.errors import NotFound, WrennError
from wrenn_sandbox.wire.host import Host

_log = structlog.get_logger(__name__)


class DiscardedImages:
    def __init__(self, store: Store, host: Host) -> None:
        self._store = store.snapshots
        self._host = host

    async def remove(self) -> None:
        """Remove what can be removed now; the rest stays noted for the next time."""
        done = []
        for image_id in await self._store.discarded():
            try:
                await self._host.remove_image(image_id)
            except NotFound:
                done.append(image_id)
            except WrennError as error:
                _log.warning("image not removed", image_id=image_id, error=error.message)
            else:
                done.append(image_id)
        if done:
            await self._store.forget_discarded(done)
