"""The one place where errors become HTTP responses.

Every failure is `{"error": {"code", "message", ...}}`. An error of the platform's own carries its
code and status (`wrenn_sandbox.errors`); everything else is translated here. Another API on the
same server may have a form of its own: `ERROR_FORM`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

from wrenn_sandbox.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    TooLarge,
    WrennError,
)

ERROR_FORM: Final = "wrenn.error_form"
"""Key of the scope where an API keeps the form of its errors, an `ErrorForm`."""

Headers = Mapping[str, str]
ErrorForm = Callable[[WrennError, Headers], Response]
"""Makes the response to an error, with these headers."""


def content_of(error: WrennError) -> dict[str, str]:
    """What a caller is told of `error`: `code`, `message` and what else it has."""
    return {"code": error.code, "message": error.message, **error.extra()}


ERRORS_TOLD: Final = "wrenn.errors"
"""Key of the scope of a request: the codes of the errors that it was answered with."""


def note_error(scope: Scope, code: str) -> None:
    """Remember what a request was answered with, where somebody counts that."""
    scope.get(ERRORS_TOLD, []).append(code)


def json_response(content: object, status: int, headers: Headers) -> Response:
    """The response with this content; what is no Unicode in it is replaced."""
    return Response(
        json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


class _ErrorResponse(Response):
    """Tells a caller of `error` in the form of the API that was called, and notes its code."""

    def __init__(self, error: WrennError, headers: Headers) -> None:
        own = json_response({"error": content_of(error)}, error.status, headers)
        super().__init__(own.body, error.status, own.headers)
        self._error = error
        self._more = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_error(scope, self._error.code)
        form: ErrorForm | None = scope.get(ERROR_FORM)
        if form is None:
            await super().__call__(scope, receive, send)
        else:
            await form(self._error, self._more)(scope, receive, send)


def error_response(error: WrennError, headers: Headers | None = None) -> Response:
    """The response that tells a caller of `error`."""
    all_headers = dict(headers or {})
    if error.retry_after is not None:
        all_headers["Retry-After"] = str(ceil(error.retry_after))
    if error.status == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    return _ErrorResponse(error, all_headers)


def invalid(problems: Sequence[ErrorDetails]) -> InvalidRequest:
    """Names the first field that is not acceptable, and why."""
    problem = problems[0]
    where = [str(part) for part in problem["loc"]]
    if where and where[0] in ("body", "query", "path", "header"):
        where = where[1:]
    message = problem["msg"]
    if problem["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {message}")
    field = ".".join(where) or "body"
    if problem["type"] == "extra_forbidden":
        message = "is not a field that this server knows"
    return InvalidRequest(f"{field}: {_safe(message)}")


def _safe(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def add_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error in the one form. Call it after the routes are there."""
    routes = [
        (compile_path(each.path)[0], each.methods)
        for each in iter_route_contexts(app.routes)
        if each.path is not None and each.methods
    ]

    def allowed(path: str) -> str:
        known = {each for pattern, methods in routes if pattern.match(path) for each in methods}
        return ", ".join(sorted(known | {"HEAD"} if "GET" in known else known))

    async def wrenn(_: Request, error: Exception) -> Response:
        assert isinstance(error, WrennError)
        return error_response(error)

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        return error_response(invalid(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return error_response(NotFound("There is no such route; see /docs"))
        if error.status_code == 405:
            methods = allowed(request.url.path)
            return error_response(
                MethodNotAllowed(f"This route knows {methods} only"), {"Allow": methods}
            )
        if error.status_code == 413:
            return error_response(TooLarge("The body is too large"))
        if error.status_code < 500:
            return error_response(InvalidRequest("The request is not acceptable"))
        return error_response(INTERNAL)

    app.add_exception_handler(WrennError, wrenn)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(ValidationError, validation)
    app.add_exception_handler(HTTPException, http)


INTERNAL = InternalError(
    "Something went wrong on the server; its log has the details under this request id"
)
