"""Which pages of other origins a browser lets use the API."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from wrenn_sandbox.errors import Forbidden, InvalidRequest

from .errors import error_response
from .idempotency import HEADER, REPLAYED

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Last-Event-ID",
    "X-API-Key",
    "X-Request-Id",
    HEADER,
)
_ANSWER_HEADERS = ("X-Request-Id", "X-Next-Cursor", "Link", "Retry-After", REPLAYED)


class Cors(CORSMiddleware):
    """Lets the pages of exactly these origins read answers, errors included.

    Nothing is allowed with cookies: credentials of the API are headers, which only a page that
    holds them can send.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=_REQUEST_HEADERS,
            expose_headers=_ANSWER_HEADERS,
            allow_credentials=False,
            max_age=600,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """An answer in the form of all others also when it is no."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        if not self.is_allowed_origin(origin=request_headers["origin"]):
            return error_response(Forbidden("This origin is not one of WRENN_CORS_ORIGINS"))
        return error_response(
            InvalidRequest("This method or header is not allowed"), {"Vary": "Origin"}
        )
