"""The one place where errors become HTTP responses.

Every failure is `{"error": {"code", "message", ...}}`. An error of the platform's own carries its
code and status (`wrenn_sandbox.errors`); everything else is translated here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from math import ceil

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from wrenn_sandbox.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    TooLarge,
    WrennError,
)


def error_response(error: WrennError, headers: Mapping[str, str] | None = None) -> Response:
    """The response that tells a caller of `error`."""
    content = {"code": error.code, "message": error.message, **error.extra()}
    all_headers = dict(headers or {})
    if error.retry_after is not None:
        all_headers["Retry-After"] = str(ceil(error.retry_after))
    if error.status == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    return Response(
        json.dumps({"error": content}, ensure_ascii=False).encode("utf-8", "replace"),
        status_code=error.status,
        media_type="application/json",
        headers=all_headers,
    )


def invalid(problems: Sequence[ErrorDetails]) -> InvalidRequest:
    """Names the first field that is not acceptable, and why."""
    problem = problems[0]
    where = [str(part) for part in problem["loc"]]
    if where and where[0] in ("body", "query", "path"):
        where = where[1:]
    message = problem["msg"]
    if problem["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {message}")
    field = ".".join(where) or "body"
    return InvalidRequest(f"{field}: {_safe(message)}")


def _safe(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


class AllowedMethods:
    """Which methods each path of an application knows."""

    def __init__(self, app: FastAPI) -> None:
        self._paths: dict[re.Pattern[str], set[str]] = {}
        for context in iter_route_contexts(app.routes):
            path, methods = getattr(context, "path", None), getattr(context, "methods", None)
            if isinstance(path, str) and methods:
                self._paths.setdefault(compile_path(path)[0], set()).update(methods)

    def of(self, path: str) -> str:
        """The value of the `Allow` header."""
        methods = {
            method
            for pattern, known in self._paths.items()
            if pattern.match(path)
            for method in known
        }
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))


def add_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every error in the one form. Call it after the routes are there."""
    allowed = AllowedMethods(app)

    async def wrenn(_: Request, error: Exception) -> Response:
        return error_response(error if isinstance(error, WrennError) else InternalError(""))

    async def validation(_: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError | ValidationError):
            return error_response(invalid(error.errors()))
        raise error

    async def http(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        if error.status_code == 404:
            return error_response(NotFound("There is no such route; see /docs"))
        if error.status_code == 405:
            methods = allowed.of(request.url.path)
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
