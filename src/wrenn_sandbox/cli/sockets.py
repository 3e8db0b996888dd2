"""How the server speaks WebSocket."""

import asyncio
from typing import Final

from uvicorn._types import ASGISendEvent
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame

from wrenn_sandbox.control.api.sockets import LOST_EVENT

from .connections import Place

MESSAGE_LIMIT: Final = 1024 * 1024
"""Bytes of one message of a client's; a larger one closes the connection with 1009."""

PING_SECONDS: Final = 20.0

CLOSE_SECONDS: Final = 30.0
"""How long a client may take to read the rest of what was sent before the end."""

_FRAGMENTS: Final = 1024
"""Fragments of a message that are kept apart."""


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Tells the application of a lost connection also while it reads no messages.

    A client that is behind with reading answers no pings, so a missing answer ends nothing:
    a client that is gone for good is noticed by TCP. It may read as slowly as it likes: what waits
    for it is bounded, pongs and fragments included.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._lost = asyncio.Event()
        self._closing_since: float | None = None
        self.place: Place | None = None
        """The connection's place, to be released at its end."""
        super().__init__(config, server_state, {**app_state, LOST_EVENT: self._lost}, _loop)

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # refused, which is an answer too

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost.set()
        if self.place is not None:
            self.place.release()

    def handle_ping(self) -> None:
        output = self.conn.data_to_send()
        if self.writable.is_set():
            self.transport.write(b"".join(output))

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= _FRAGMENTS:
            self.frames = [b"".join(self.frames)]
        super().handle_cont(event)

    def check(self, now: float) -> None:
        """Cut off, at `now` of the loop, who does not read the rest of what was sent."""
        if not self.transport.is_closing():
            return
        if self._closing_since is None:
            self._closing_since = now
        elif now - self._closing_since > CLOSE_SECONDS:
            self.transport.abort()
