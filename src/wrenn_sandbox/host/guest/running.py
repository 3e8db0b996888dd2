"""All calls into one guest."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from wrenn_sandbox.errors import NotResponding
from wrenn_sandbox.wire.messages import GuestMetrics

from .archives import GuestArchives
from .connection import GuestUnreachable
from .files import GuestFiles


class RunningGuest(GuestFiles, GuestArchives):
    """Implements `wire.guest.Guest` for one life of a VM: its calls end with that life."""

    async def health(self) -> None:
        try:
            await self._client.answer()
        except GuestUnreachable as error:
            raise NotResponding("The guest cannot be reached", detail=error.detail) from error

    async def metrics(self) -> GuestMetrics:
        return await self._client.metrics()

    def connect(
        self, port: int, sent: AsyncIterator[bytes]
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._client.tunnel(port, sent)

    async def agent_token(self) -> str:
        return self._client.token
