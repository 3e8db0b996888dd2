"""How the server speaks HTTP/1.1: strictly, within limits, and not for ever."""

import asyncio
import fcntl
import re
import socket
import struct
import sys
import termios
from collections.abc import Iterable
from contextlib import ExitStack
from enum import Enum
from functools import partial
from typing import Final

import httptools
import structlog
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState
from websockets.datastructures import Headers
from websockets.http11 import Request
from websockets.server import ServerProtocol

from wrenn_sandbox.control.api.errors import error_response
from wrenn_sandbox.control.api.headers import secured
from wrenn_sandbox.edge.address import is_for_port
from wrenn_sandbox.edge.exchange import CUT, KEEPER, UPGRADABLE
from wrenn_sandbox.edge.line import Keeper
from wrenn_sandbox.errors import (
    HeadTooLarge,
    InvalidRequest,
    RequestTimeout,
    UrlTooLong,
    WrennError,
)
from wrenn_sandbox.ids import new_request_id
from wrenn_sandbox.settings import EdgeSettings

from .turns import ParseScheduler
from .websocket_protocol import CLOSE_SECONDS, WebSocketProtocol

_log = structlog.get_logger("wrenn_sandbox.access")

HEAD_LIMIT: Final = 64 * 1024
"""Bytes of a request line and its headers; as many of trailers and of what frames chunks."""

URL_LIMIT: Final = 16 * 1024
HEADERS_LIMIT: Final = 100
PIPELINE_LIMIT: Final = 16
"""Requests that wait for the answers to those before them on their connection."""

PROGRESS_BYTES: Final = 1024
"""A body that brings fewer in `body_timeout_sec` has stalled."""

LINGER_SECONDS: Final = 1.0
"""How long a refused client may go on sending, so that it comes to read why."""

_RESET: Final = struct.pack("ii", 1, 0)
"""For SO_LINGER."""

_SLICE: Final = 4096
"""Bytes that are parsed at once: up to 680 chunks of a body."""

_UPGRADE_LINE_LIMIT: Final = 8000
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")


class _Reading(Enum):
    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    RAW = "raw"
    REFUSED = "refused"


def refusal(error: WrennError, scheme: str, defaults: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The whole answer that tells a client of `error` and of the end of its connection."""
    answer = error_response(error, {"Connection": "close", "X-Request-Id": new_request_id()})
    headers = [*defaults, *secured(answer.raw_headers, scheme)]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"%b%b\r\n%b" % (STATUS_LINE[error.status], lines, bytes(answer.body))


class HttpProtocol(HttpToolsProtocol):
    """One connection. `check` is to be called about once a second."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        settings: EdgeSettings,
        place: ExitStack,
    ) -> None:
        self._keeper = Keeper()
        super().__init__(config, server_state, app_state)
        self.url = b""
        self.headers = []
        self._settings = settings
        self._place = place
        self._reading = _Reading.HEAD
        self._since = self.loop.time()
        self._head_bytes = 0
        self._unparsed: int | None = 0
        self._overhead = 0
        self._progress = 0
        self._head_is_known = False
        self._running: RequestResponseCycle | None = None
        self._unsent = 0
        self._unsent_since = self._since
        self._is_for_port = False
        self._held: bytearray | None = None
        """What came behind a head whose upgrade is not decided."""

    # the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._turns = ParseScheduler(transport, self._take, _SLICE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._turns.drop()
        super().connection_lost(exc)
        self._place.close()
        self._keeper.close()
        self._disconnect(self._running)

    def data_received(self, data: bytes) -> None:
        self._turns.take(data)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._reading is not _Reading.RAW or self._held is not None or self.scheme == "https":
            return None
        self.cycle.more_body = False
        self.cycle.message_event.set()
        return True

    def _take(self, data: bytes) -> None:
        if self._reading is _Reading.REFUSED:
            return
        if self._reading is _Reading.RAW:
            self._take_raw(data)
            return
        self._unset_keepalive_if_required()
        if self._reading is _Reading.IDLE:
            self._reading, self._since, self._unparsed = _Reading.HEAD, self.loop.time(), 0
        self._overhead += len(data)
        try:
            self._feed(data)
            self._check_unparsed(len(data))
        except WrennError as error:
            self._refuse(error)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            unknown = InvalidRequest("The request is not acceptable")
            self._refuse(cause if isinstance(cause, WrennError) else unknown)
        except httptools.HttpParserError as error:
            self._refuse(InvalidRequest(f"This is not HTTP/1.1: {error}"))

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            elif self._is_upgradable():
                self._held = bytearray(data[upgrade.args[0] :])
                self._reading = _Reading.RAW
            else:
                self._decline_upgrade()
                self._feed(data[upgrade.args[0] :])

    def _decline_upgrade(self) -> None:
        """Go on in HTTP/1.1 behind a head that also offered another protocol.

        The parser that read this head takes what follows for the other protocol: a new one is
        told how long the body is.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        framing = [b"%b: %b\r\n" % header for header in self.headers if header[0] in _FRAMING]
        self._head_is_known = True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
        self._head_is_known = False

    def handle_websocket_upgrade(self) -> None:
        self._turns.drop()
        super().handle_websocket_upgrade()
        protocol = self.transport.get_protocol()
        assert isinstance(protocol, WebSocketProtocol)
        protocol.place = self._place

    # raw bytes, behind an upgrade that is the application's

    def _is_upgradable(self) -> bool:
        return bool(self.scope["state"].get(UPGRADABLE))

    def _take_raw(self, data: bytes) -> None:
        kept = self.cycle.body if self._held is None else self._held
        kept += data
        if len(kept) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        if self._held is None:
            self.cycle.message_event.set()

    async def _serve_upgrade(
        self,
        app: ASGI3Application,
        scope: Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
    ) -> None:
        """Run the application for a request that may make this connection one of raw bytes."""

        async def sending(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start" and self._held is not None:
                held, self._held = bytes(self._held), None
                if message["status"] == 101:
                    self._switch(message["headers"])
                    self._take_raw(held)
                    return
                self._reading = _Reading.BODY
                self._decline_upgrade()
                await send(message)
                if held:
                    self._take(held)
            elif message["type"] == "http.response.body" and self._reading is _Reading.RAW:
                await self._send_raw(message.get("body", b""), message.get("more_body", False))
            else:
                await send(message)

        await app(scope, receive, sending)
        if self._reading is _Reading.RAW and self._held is None:
            self.cycle.disconnected = True
            self.transport.close()

    def _switch(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        lines = b"".join(b"%b: %b\r\n" % each for each in headers)
        self.transport.write(b"%b%b\r\n" % (STATUS_LINE[101], lines))
        self.cycle.response_started = True

    async def _send_raw(self, data: bytes, more: bool) -> None:
        if self.flow.write_paused and not self.cycle.disconnected:
            await self.flow.drain()
        if self.cycle.disconnected:
            return
        if data:
            self.transport.write(data)
        if not more:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:
                self.transport.close()

    # the parser

    def on_message_begin(self) -> None:
        if self._head_is_known:
            return
        super().on_message_begin()
        self._reading = _Reading.HEAD
        self._since = self.loop.time()
        self._head_bytes = 0
        self._unparsed = None

    def on_url(self, url: bytes) -> None:
        if self._head_is_known:
            return
        super().on_url(url)
        if len(self.url) > URL_LIMIT:
            raise UrlTooLong(f"The URL is longer than {URL_LIMIT} bytes")
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_is_known:
            return
        self._count_head(len(name) + len(value) + 4)
        if self._reading is _Reading.BODY:
            return  # a trailer, which nothing here needs
        super().on_header(name, value)
        if len(self.headers) > HEADERS_LIMIT:
            raise HeadTooLarge(f"The request has more than {HEADERS_LIMIT} headers")

    def on_headers_complete(self) -> None:
        if self._head_is_known:
            return
        self._is_for_port = is_for_port(self.headers, self.url, self._settings.domain)
        self._check_head()
        if self._is_for_port:
            self.scope["state"][CUT] = self._cut
            self.scope["state"][KEEPER] = self._keeper
            self.scope["state"][UPGRADABLE] = self._wants_upgrade()
        if len(self.pipeline) >= PIPELINE_LIMIT:
            raise InvalidRequest("Too many requests wait on this connection")
        super().on_headers_complete()
        self._reading = _Reading.BODY
        self._since = self.loop.time()
        self._head_bytes = self._progress = self._overhead = 0

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._overhead = 0
        self._progress += len(body)
        if self._progress >= PROGRESS_BYTES:
            self._progress, self._since = 0, self.loop.time()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and not self._should_upgrade():
            return  # only its head is read
        super().on_message_complete()
        self._reading = _Reading.IDLE

    # the application

    def _should_upgrade(self) -> bool:
        return not self._is_for_port and super()._should_upgrade()

    def _wants_upgrade(self) -> bool:
        """Whether to ask the application about the upgrade that this head offers.

        Not behind a body, nor before earlier answers: then it is declined, as a server may.
        """
        framed = any(name in _FRAMING and value.strip() != b"0" for name, value in self.headers)
        return (
            self.parser.should_upgrade()
            and self._get_upgrade() is not None
            and not (framed or self._is_pending())
            and self.parser.get_http_version() == "1.1"
        )

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        if cycle.scope["state"].get(UPGRADABLE):
            app = partial(self._serve_upgrade, app)
        super()._start_asgi_task(cycle, app)

    # limits

    def check(self, now: float) -> None:
        """End what has taken too long at `now`, a time of the loop's."""
        if self._is_stuck(now):
            self._give_up("unread")
            return
        is_ours = self.flow.read_paused or self._is_behind() or self._owes_continue()
        of_port = self._is_for_port and self._reading is _Reading.BODY and self._is_pending()
        if is_ours or of_port:
            self._since = now  # it is us who do not get on, or the port has limits of its own
        waited = now - self._since
        head_seconds = self._settings.head_timeout_sec
        body_seconds = self._settings.body_timeout_sec
        if self._reading is _Reading.REFUSED and waited > LINGER_SECONDS:
            self.transport.close()
        elif self._reading is _Reading.HEAD and waited > head_seconds:
            self._refuse(RequestTimeout(f"Send the head within {head_seconds:.0f} s"))
        elif self._reading is _Reading.BODY and waited > body_seconds:
            least = f"{PROGRESS_BYTES >> 10} KiB every {body_seconds:.0f} s"
            self._refuse(RequestTimeout(f"The upload stalled: send at least {least}"))

    def shutdown(self) -> None:
        if self._reading is _Reading.REFUSED:
            self.transport.close()
        elif self._reading is _Reading.RAW and self._held is None:
            self._cut("the server stops")
        else:
            super().shutdown()

    def _is_pending(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _is_behind(self) -> bool:
        """Whether what is being read comes after a request that is still being answered."""
        return self._is_pending() and (
            self._reading is _Reading.HEAD or self._running is not self.cycle
        )

    def _owes_continue(self) -> bool:
        """Whether the client waits for 100 before it sends its body."""
        return self._reading is _Reading.BODY and self.cycle.waiting_for_100_continue

    def _is_stuck(self, now: float) -> bool:
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            unsent += self._on_its_way()
        if not unsent or unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
            return False
        limit = self._settings.write_timeout_sec
        if self.transport.is_closing():
            limit = min(limit, CLOSE_SECONDS)
        return now - self._unsent_since > limit

    def _on_its_way(self) -> int:
        """Bytes that the system has taken and the client has not: it takes more in large steps."""
        connection = self.transport.get_extra_info("socket")
        if connection is None:
            return 0  # over TLS the end is told a moment later
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_LIMIT:
            raise HeadTooLarge(f"The head is larger than {HEAD_LIMIT} bytes")

    def _check_unparsed(self, size: int) -> None:
        """Bounds what the parser has taken in and has not told of yet."""
        if self._reading is _Reading.HEAD:
            self._unparsed = 0 if self._unparsed is None else self._unparsed + size
            if self._unparsed > HEAD_LIMIT:
                raise HeadTooLarge(f"The head is larger than {HEAD_LIMIT} bytes")
        elif self._reading is _Reading.BODY and self._overhead > HEAD_LIMIT:
            raise HeadTooLarge("Chunk headers are too large")

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise InvalidRequest("Unsupported HTTP version; use HTTP/1.1")
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            raise InvalidRequest("Send exactly one Host header")
        if hosts and not _HOST.fullmatch(hosts[0]):
            raise InvalidRequest("The Host header is not a host")
        fields = dict(self.headers)
        coding = fields.get(b"transfer-encoding")
        if coding is not None and (version == "1.0" or coding.strip().lower() != b"chunked"):
            raise InvalidRequest("The only supported Transfer-Encoding is chunked")
        if self.parser.should_upgrade():
            self._check_upgrade(version, fields)

    def _check_upgrade(self, version: str, fields: dict[bytes, bytes]) -> None:
        if not self._should_upgrade():
            return
        if b"transfer-encoding" in fields or fields.get(b"content-length", b"0").strip() != b"0":
            raise InvalidRequest("A WebSocket request must have no body")
        if self._is_pending():
            raise InvalidRequest("Wait for the answer before you upgrade")
        if self.parser.get_method() != b"GET" or version != "1.1":
            raise InvalidRequest("A WebSocket must start with GET and HTTP/1.1")
        if fields.get(b"sec-websocket-version", b"").strip() != b"13":
            raise InvalidRequest("Sec-WebSocket-Version must be 13")
        if not _KEY.fullmatch(fields.get(b"sec-websocket-key", b"").strip()):
            raise InvalidRequest("Sec-WebSocket-Key must be 16 bytes in base64")
        longest = max(len(name) + len(value) for name, value in self.headers)
        if max(longest, len(self.url)) > _UPGRADE_LINE_LIMIT:
            raise HeadTooLarge("A line of the head is too long for a WebSocket")
        fields_as_text = ((name.decode(), value.decode("latin-1")) for name, value in self.headers)
        request = Request(self.url.decode(), Headers(fields_as_text))
        if ServerProtocol().accept(request).status_code != 101:
            raise InvalidRequest("The headers are not those of a WebSocket (RFC 6455)")

    # the end

    def _refuse(self, error: WrennError) -> None:
        """Answer `error` where that is still possible, and end the connection."""
        if self.transport.is_closing():
            return
        pending = self._is_pending()
        if self._is_behind() or (pending and self.cycle.response_started):
            self._give_up(error.message)
            return
        in_body = self._reading is _Reading.BODY
        silent = not in_body and not self._head_bytes and isinstance(error, RequestTimeout)
        if silent or (in_body and not pending):
            self.transport.close()
            return
        self._disconnect(self._running)
        self._log_end(error.message, error.status)
        defaults = self.server_state.default_headers
        self.transport.write(refusal(error, self.scheme or "http", defaults))
        self._reading, self._since = _Reading.REFUSED, self.loop.time()
        self.flow.resume_reading()

    def _cut(self, why: str) -> None:
        """Give up so that what was sent does not look as if it had come to its end."""
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._give_up(why)

    def _give_up(self, why: str) -> None:
        self._log_end(why, 0)
        self._disconnect(self._running)
        self.transport.abort()

    def _log_end(self, why: str, status: int) -> None:
        client = self.client[0] if self.client else "unknown"
        _log.info("connection ended", client=client, status=status, reason=why)

    def _disconnect(self, cycle: RequestResponseCycle | None) -> None:
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            self.flow.resume_writing()
        self.pipeline.clear()
