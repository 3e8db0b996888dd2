"""All calls into one guest."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import msgspec

from wrenn_sandbox.errors import NotResponding
from wrenn_sandbox.host.slot import Denials
from wrenn_sandbox.wire.messages import GuestMetrics

from .archives import GuestArchives
from .client import GuestClient
from .connection import GuestUnreachable
from .files import GuestFiles


class RunningGuest(GuestFiles, GuestArchives):
    """Implements `wire.guest.Guest` for one life of a VM: its calls end with that life."""

    def __init__(
        self, client: GuestClient, denials: Callable[[], Denials | None] = lambda: None
    ) -> None:
        """`denials` tells what the guest was refused by name."""
        super().__init__(client)
        self._denials = denials

    async def health(self) -> None:
        try:
            await self._client.answer()
        except GuestUnreachable as error:
            raise NotResponding("The guest cannot be reached", detail=error.detail) from error

    async def metrics(self) -> GuestMetrics:
        metrics, denied = await self._client.metrics(), self._denials()
        if denied is None:
            return metrics
        return msgspec.structs.replace(
            metrics, egress_denied=denied.count, egress_denied_names=denied.names
        )

    def connect(
        self, port: int, sent: AsyncIterator[bytes]
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._client.tunnel(port, sent)

    async def agent_token(self) -> str:
        return self._client.token
