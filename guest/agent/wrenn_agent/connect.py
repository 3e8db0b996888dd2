"""Connect RPC over HTTP/1.1 with the JSON codec: unary calls, server and client streams."""

from __future__ import annotations

import json
import time

from . import fields
from .errors import (
    AgentError,
    DeadlineExceeded,
    Disconnected,
    InvalidArgument,
    PayloadTooLarge,
    Unimplemented,
    UnsupportedMedia,
)
from .exchange import Exchange
from .fields import Message
from .loop import Loop, Notice, Timer, report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    UnaryHandler = Callable[[Exchange, Message], Awaitable[Message | bytes]]
    StreamHandler = Callable[["StreamCall"], Awaitable[None]]

UNARY_LIMIT = 4 * 1024 * 1024
ENVELOPE_LIMIT = 8 * 1024 * 1024
DEFAULT_KEEPALIVE = 90.0
_UNARY_TYPE, _STREAM_TYPE = "application/json", "application/connect+json"
_COMPRESSED, _END_OF_STREAM = 0x01, 0x02


def unary(handler: UnaryHandler) -> Callable[[Exchange], Awaitable[None]]:
    """A route that answers one message with one message (bytes: JSON text already)."""

    async def route(exchange: Exchange) -> None:
        if exchange.head.media_type != _UNARY_TYPE:
            raise UnsupportedMedia("content type must be application/json")
        if exchange.headers.get("content-encoding", "identity") != "identity":
            raise Unimplemented("compressed messages are not supported")
        message = fields.parse(await exchange.body.whole(UNARY_LIMIT))
        answer = await handler(exchange, message)
        await exchange.reply(200, answer if isinstance(answer, bytes) else dump(answer))

    return route


def stream(loop: Loop, handler: StreamHandler) -> Callable[[Exchange], Awaitable[None]]:
    """A route that answers with a stream of messages; errors end the stream, the status is 200."""

    async def route(exchange: Exchange) -> None:
        if exchange.head.media_type != _STREAM_TYPE:
            raise UnsupportedMedia("content type must be application/connect+json")
        call = StreamCall(loop, exchange)
        error: AgentError | None = None
        try:
            await handler(call)
        except AgentError as told:
            error = told
        except Disconnected:
            raise
        except Exception as unexpected:
            report(unexpected)
            error = AgentError("internal error of the guest agent")
        finally:
            call.cancel_timers()
        await call.finish(error)

    return route


def dump(message: Message) -> bytes:
    """Compact JSON."""
    return json.dumps(message, separators=(",", ":")).encode()


class StreamCall:
    """One streaming call: messages in, messages out, a deadline and keepalives.

    Messages are collected by `put()` and sent by `flush()`, which waits for a slow reader.
    """

    def __init__(self, loop: Loop, exchange: Exchange) -> None:
        self._loop = loop
        self.exchange = exchange
        self._frames: list[bytes] = []
        self._chunked = exchange.head.version == "HTTP/1.1"
        self._keepalive: Timer | None = None
        self._deadline: Timer | None = None
        self._last_sent = time.monotonic()
        self._finished = False
        self.keepalive_due = False
        timeout = _header_number(exchange, "connect-timeout-ms", 0.0) / 1000
        if timeout > 0:
            task = loop.current
            self._deadline = loop.call_later(
                timeout, lambda: task.interrupt(DeadlineExceeded("deadline of the call exceeded"))
            )

    async def receive(self) -> Message | None:
        """The next message of the client, None at the end of its stream."""
        header = await self.exchange.body.exactly(5)
        if header is None:
            return None
        if header[0] & _COMPRESSED:
            raise Unimplemented("compressed messages are not supported")
        size = int.from_bytes(header[1:], "big")
        if size > ENVELOPE_LIMIT:
            raise PayloadTooLarge(f"message is larger than {ENVELOPE_LIMIT} bytes")
        payload = await self.exchange.body.exactly(size) if size else b""
        if payload is None:
            raise InvalidArgument("message is cut off")
        if header[0] & _END_OF_STREAM:
            return None
        return fields.parse(payload)

    async def receive_request(self) -> Message:
        """The one message of a server-stream call."""
        message = await self.receive()
        if message is None:
            raise InvalidArgument("request message missing")
        return message

    def put(self, message: bytes) -> None:
        """Queue a message, given as JSON text."""
        self._put_frame(0, message)

    async def flush(self) -> None:
        """Send what is queued."""
        if self._frames:
            frames, self._frames = b"".join(self._frames), []
            if self.exchange.answered:
                await self.exchange.connection.send(frames)
            else:
                headers = (("Content-Type", _STREAM_TYPE),)
                await self.exchange.send_head(200, headers, None, frames)
            self._last_sent = time.monotonic()
            self.keepalive_due = False

    async def finish(self, error: AgentError | None = None) -> None:
        """Send the end of the stream along with what is queued; repeating is harmless."""
        exchange = self.exchange
        if self._finished:
            return
        self._finished = True
        if exchange.connection.torn:
            raise Disconnected
        trailer = b"{}"
        if error is not None:
            trailer = dump({"error": {"code": error.code, "message": error.message}})
        if not exchange.body.finished and not exchange.body.skip_buffered():
            exchange.connection.receive_now()
            exchange.settle_body()
        self._put_frame(_END_OF_STREAM, trailer)
        if self._chunked:
            self._frames.append(b"0\r\n\r\n")
        await self.flush()

    def keep_alive(self, notice: Notice) -> None:
        """From now on raise `keepalive_due` and notify when the stream has been quiet for long."""
        interval = _header_number(self.exchange, "keepalive-ping-interval", DEFAULT_KEEPALIVE)
        if interval <= 0:
            interval = DEFAULT_KEEPALIVE

        def check() -> None:
            quiet = time.monotonic() - self._last_sent
            if quiet >= interval:
                self.keepalive_due = True
                notice.notify()
                quiet = 0.0
            self._keepalive = self._loop.call_later(interval - quiet, check)

        self._keepalive = self._loop.call_later(interval, check)

    def cancel_timers(self) -> None:
        """Stop the deadline and the keepalives."""
        for timer in (self._keepalive, self._deadline):
            if timer is not None:
                timer.cancel()

    def _put_frame(self, flags: int, payload: bytes) -> None:
        size = len(payload)
        if self._chunked:
            self._frames.append(b"%x\r\n" % (size + 5))
        self._frames.append(flags.to_bytes(1, "big") + size.to_bytes(4, "big"))
        self._frames.append(payload)
        if self._chunked:
            self._frames.append(b"\r\n")


def _header_number(exchange: Exchange, name: str, default: float) -> float:
    value = exchange.headers.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.replace(".", "", 1).isdigit() and len(value) <= 12):
        raise InvalidArgument(f"{name} must be a number")
    return float(value)
