"""What surrounds every request, as plain ASGI: request id, headers, limits, log, last resort."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wrenn_sandbox.control.metrics import Metrics
from wrenn_sandbox.errors import RateLimited, TooLarge
from wrenn_sandbox.ids import new_request_id

from .errors import ERRORS_TOLD, INTERNAL, error_response
from .forwarded import group_of
from .headers import secured

_log = structlog.get_logger("wrenn_sandbox.access")
_HEADS = ("http.response.start", "websocket.http.response.start", "websocket.accept")
"""The messages of ASGI that begin an answer."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Names each request, logs and counts it, and adds the headers that every answer has.

    An `X-Request-Id` of the caller's is kept when it is 1 to 128 letters, digits, `.`, `_`, `:`
    or `-`. The log has paths, never what follows the question mark.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        status = 0
        begin = time.perf_counter()
        told: list[str] = []
        scope[ERRORS_TOLD] = told

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] in _HEADS:
                status = message.get("status", 101)
                message["headers"] = secured(list(message.get("headers", ())), scope["scheme"])
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, named)
            finally:
                seconds = time.perf_counter() - begin
                route = getattr(scope.get("route"), "path", "none")
                method = scope.get("method", "WEBSOCKET")
                self._metrics.request(method, route, status, seconds)
                for code in told:
                    self._metrics.refusal(code)
                _log.info(
                    "request",
                    method=method,
                    path=quote(scope["path"], safe="/:@~", errors="replace"),
                    client=client_address(scope),
                    status=status,
                    ms=round(seconds * 1000, 2),
                )


def client_address(scope: Scope) -> str:
    """Where a request comes from; see `forwarded.py` for requests that come through proxies."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


HEAD_ALONE = "wrenn.head"
"""Key of the scope that says that nobody takes the body: a long one need not be made."""


class Heads:
    """Answers HEAD as GET is answered, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET", HEAD_ALONE: True}

        async def bare(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(asked, receive, bare)
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]


class ServerErrors:
    """Answers 500 for what nobody has caught; the log has the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] in _HEADS
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            _log.exception("request failed")
            if started or scope["type"] not in ("http", "websocket"):
                raise
            await error_response(INTERNAL)(scope, receive, watched)


class RequestPlaces:
    """Bounds how many requests and WebSockets one client address has under way at once.

    The server counts connections; behind a trusted proxy it sees only the proxy's, and this counts.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def take(self, scope: Scope) -> Iterator[None]:
        """One more for who asks, until the end of the block; raises `RateLimited`."""
        address = group_of(client_address(scope))
        if self._under_way[address] >= self._limit:
            raise RateLimited("Too many requests at once from this address", retry_after=1)
        self._under_way[address] += 1
        try:
            yield
        finally:
            self._under_way[address] -= 1
            if not self._under_way[address]:
                del self._under_way[address]


class Concurrency:
    """Lets in who finds a place among `places`."""

    def __init__(self, app: ASGIApp, *, places: RequestPlaces) -> None:
        self._app = app
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        with ExitStack() as place:
            try:
                place.enter_context(self._places.take(scope))
            except RateLimited as busy:
                await error_response(busy)(scope, receive, send)
                return
            await self._app(scope, receive, send)


class _TooMuch(Exception):
    pass


class BodyLimit:
    """Refuses bodies beyond `limit` bytes, announced or not, before they are kept in memory.

    `exceptions` gives other limits to paths that match whole, None for none. What is sent beyond
    those is read and dropped, so that a client in the middle of its upload sees the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        exceptions: Sequence[tuple[re.Pattern[str], int | None]] = (),
    ) -> None:
        self._app = app
        self._limit = limit
        self._exceptions = exceptions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit: int | None = self._limit
        headers = {"Connection": "close"}
        for pattern, other in self._exceptions:
            if pattern.fullmatch(scope["path"]):
                limit, headers = other, {}
        if limit is None:
            await self._app(scope, receive, send)
            return
        refusal = error_response(TooLarge(f"The body is larger than {limit} bytes"), headers)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            await refusal(scope, receive, send)
            return
        received = 0
        started = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _TooMuch
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooMuch:
            if started:
                raise
            await refusal(scope, receive, send)
