"""What surrounds every request, as plain ASGI: request id, body limit, access log, last resort."""

import re
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wrenn_sandbox.control.metrics import Metrics
from wrenn_sandbox.errors import TooLarge
from wrenn_sandbox.ids import Random, new_request_id

from .errors import INTERNAL, error_response

_log = structlog.get_logger("wrenn_sandbox.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Names each request, logs and counts it, and answers 500 for what nobody has caught.

    An `X-Request-Id` of the caller's is kept when it is 1 to 128 letters, digits, `.`, `_`, `:`
    or `-`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, random: Random) -> None:
        self._app = app
        self._metrics = metrics
        self._random = random

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id(self._random)
        status = 0
        begin = time.perf_counter()

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, named)
            except Exception:
                _log.exception("request failed")
                if status:
                    raise
                await error_response(INTERNAL)(scope, receive, named)
            finally:
                seconds = time.perf_counter() - begin
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.request(scope["method"], route, status, seconds)
                _log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    ms=round(seconds * 1000, 2),
                )


class _TooMuch(Exception):
    pass


class BodyLimit:
    """Refuses bodies beyond `limit` bytes, announced or not, before they are kept in memory."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limit:
            await self._refuse(scope, receive, send)
            return
        received = 0
        started = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
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
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = TooLarge(f"The body is larger than {self._limit} bytes")
        await error_response(error, {"Connection": "close"})(scope, receive, send)
