"""How the server speaks WebSocket."""

import asyncio
from typing import Final

from uvicorn._types import ASGISendEvent
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from wrenn_sandbox.control.api.sockets import LOST_EVENT

MESSAGE_LIMIT: Final = 1024 * 1024
"""Bytes of one message of a client's; a larger one closes the connection with 1009."""

PING_SECONDS: Final = 20.0


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Tells the application of a lost connection also while it reads no messages.

    A client that is behind with reading answers no pings, so a missing answer ends nothing:
    a client that is gone for good is noticed by TCP.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._lost = asyncio.Event()
        super().__init__(config, server_state, {**app_state, LOST_EVENT: self._lost}, _loop)

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # refused, which is an answer too

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost.set()
