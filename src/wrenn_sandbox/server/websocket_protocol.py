"""How the server speaks WebSocket."""

import asyncio
from contextlib import ExitStack
from typing import Final

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame

from wrenn_sandbox.control.api.streams.websocket import LOST_EVENT

from .turns import ParseScheduler

MESSAGE_LIMIT: Final = 1024 * 1024
"""Bytes of one message of a client's; a larger one closes the connection with 1009."""

PING_SECONDS: Final = 20.0

CLOSE_SECONDS: Final = 30.0
"""How long a client may take to read the rest of what was sent before the end."""

_FRAGMENTS: Final = 1024
"""Fragments of a message that are kept apart."""

_SLICE: Final = 1024
"""Bytes that are parsed at once: up to 170 frames."""

_CONTROL_BURST: Final = 1000
_CONTROL_RATE: Final = 10
"""Pings and pongs that a client may send at once, and in a second for ever."""

_POLICY_VIOLATION: Final = 1008


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Tells the application of a lost connection also while it reads no messages.

    A client that is behind with reading answers no pings, so a missing answer ends nothing:
    a client that is gone for good is noticed by TCP. It may read as slowly as it likes: what waits
    for it is bounded, pongs and fragments included. What has arrived is parsed little by little,
    and no more is read meanwhile: frames of six bytes each take a hundred times as long to parse
    as to send.
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
        self._control_frames = 0
        self.place: ExitStack | None = None
        """The connection's place, to be closed at its end."""
        super().__init__(config, server_state, {**app_state, LOST_EVENT: self._lost}, _loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._turns = ParseScheduler(transport, self._parse, _SLICE)
        self._turns.read_paused = True  # until the handshake is complete

    def data_received(self, data: bytes) -> None:
        if self.handshake_initiated:
            self._turns.take(data)
        else:
            super().data_received(data)  # the head, from the protocol before

    def _parse(self, data: bytes) -> None:
        super().data_received(data)
        self._turns.read_paused = self.read_paused

    def _go_on(self) -> None:
        if self.handshake_complete and not self.read_paused:
            self._turns.resume_reading()

    async def receive(self) -> ASGIReceiveEvent:
        message = await super().receive()
        self._go_on()
        return message

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        self._go_on()
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # refused, which is an answer too

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost.set()
        if self.place is not None:
            self.place.close()

    def handle_ping(self) -> None:
        self._count_control_frame()
        output = self.conn.data_to_send()
        if self.writable.is_set():
            self.transport.write(b"".join(output))

    def handle_pong(self, event: Frame) -> None:
        self._count_control_frame()
        super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= _FRAGMENTS:
            self.frames = [b"".join(self.frames)]
        super().handle_cont(event)

    def _count_control_frame(self) -> None:
        self._control_frames += 1
        if self._control_frames <= _CONTROL_BURST or self.transport.is_closing():
            return
        if self.close_sent:
            self.transport.close()
        else:
            self.conn.fail(_POLICY_VIOLATION, "too many pings and pongs")
            self.handle_parser_exception()

    def check(self, now: float) -> None:
        """Cut off, at `now` of the loop, who does not read the rest of what was sent.

        To be called about once a second.
        """
        self._control_frames = max(0, self._control_frames - _CONTROL_RATE)
        if not self.transport.is_closing():
            return
        if self._closing_since is None:
            self._closing_since = now
        elif now - self._closing_since > CLOSE_SECONDS:
            self.transport.abort()
