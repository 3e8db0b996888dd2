"""Errors in the form of E2B: `{"code": STATUS, "message", "error_code"}`.

Clients decide by `code` where they have no status, and by `Should-Retry` and `Retry-After` whether
they send a request again.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from wrenn_sandbox.control.api.errors import ERROR_FORM, json_response
from wrenn_sandbox.errors import KeyReused, WrennError

_PARTS: Final = frozenset({"sandboxes", "snapshots", "templates", "teams", "v2", "v3"})
"""The first parts of E2B's paths."""

_RETRIED: Final = frozenset({429, 502, 503, 504})
"""What clients send again unless they are told not to."""

_RETRY_SEC: Final = "5"


def status_of(error: WrennError) -> int:
    """The status that clients of E2B know for an error."""
    return HTTPStatus.UNPROCESSABLE_ENTITY if isinstance(error, KeyReused) else error.status


def content_of(error: WrennError) -> dict[str, int | str]:
    """What a caller is told of `error`."""
    return {"code": int(status_of(error)), "message": error.message, "error_code": error.code}


def _form(error: WrennError, headers: Mapping[str, str]) -> Response:
    status = status_of(error)
    more = {}
    if status in _RETRIED:
        more["Should-Retry"] = "true" if status == 503 or error.retry_after is not None else "false"
    if status == 503:
        more["Retry-After"] = headers.get("Retry-After", _RETRY_SEC)
    return json_response(content_of(error), status, {**headers, **more})


class ErrorForm:
    """Gives E2B's form to the errors of its paths, wherever they come from."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            first = str(scope["path"]).removeprefix("/").partition("/")[0]
            if first in _PARTS:
                scope[ERROR_FORM] = _form
        await self._app(scope, receive, send)
