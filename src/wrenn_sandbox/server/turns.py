"""What has arrived on a connection, taken in little by little: parsing costs more than sending."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from uvicorn.protocols.http.flow_control import FlowControl

_TURN_SECONDS: Final = 0.001
"""How long one connection is parsed before others have their turn."""


class ParseScheduler(FlowControl):
    """Gives `parse` what has arrived, `slice_bytes` at once, unless reading is paused.

    No more is read while something is left. A slice is to take milliseconds at most.
    """

    def __init__(
        self, transport: asyncio.Transport, parse: Callable[[bytes], None], slice_bytes: int
    ) -> None:
        super().__init__(transport)
        self._slice_bytes = slice_bytes
        self._parse = parse
        self._arrived = bytearray()
        self._has_turn = False

    def take(self, data: bytes) -> None:
        """Parse it, now or in its turn."""
        self._arrived += data
        if not self._has_turn:
            self._take_turn()

    def drop(self) -> None:
        """Forget what is left."""
        self._arrived.clear()

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self._go_on()

    def _go_on(self) -> None:
        if self._transport.is_closing():
            self._arrived.clear()
        elif not self._arrived:
            if not self.read_paused:
                self._transport.resume_reading()
        else:
            self._transport.pause_reading()
            if not self._has_turn and not self.read_paused:
                self._has_turn = True
                asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._has_turn = True
        end = time.monotonic() + _TURN_SECONDS
        while self._arrived and not self.read_paused and not self._transport.is_closing():
            piece = bytes(self._arrived[: self._slice_bytes])
            del self._arrived[: self._slice_bytes]
            self._parse(piece)
            if time.monotonic() > end:
                break
        self._has_turn = False
        self._go_on()
