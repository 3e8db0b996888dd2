"""`limit` and `cursor` of lists, and the headers that name the next page."""

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from wrenn_sandbox.control.store.records import Position
from wrenn_sandbox.errors import InvalidRequest

_LIMIT_MAX = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Page:
    """What a caller asked for; without a limit the whole list."""

    limit: int | None
    after: Position | None

    @property
    def one_more(self) -> int | None:
        """How many rows to read in order to know whether there is another page."""
        return None if self.limit is None else self.limit + 1


async def _page(
    limit: Annotated[int | None, Query(ge=1, le=_LIMIT_MAX)] = None,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Page:
    return Page(limit, None if cursor is None else _position(cursor))


PageDependency = Annotated[Page, Depends(_page)]


def _position(cursor: str) -> Position:
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        micros, _, key = (
            base64.b64decode(padded, b"-_", validate=True).decode("ascii").partition(":")
        )
        at = _EPOCH + int(micros) * _MICROSECOND
    except (ValueError, OverflowError, binascii.Error) as error:
        raise InvalidRequest("cursor: take it from the X-Next-Cursor header") from error
    if "\0" in key:
        raise InvalidRequest("cursor: take it from the X-Next-Cursor header")
    return Position(at, key)


def announce_next(request: Request, response: Response, last: Position) -> None:
    """Say in the headers of `response` where the next page begins."""
    text = f"{(last.at - _EPOCH) // _MICROSECOND}:{last.key}"
    cursor = base64.urlsafe_b64encode(text.encode("ascii")).decode("ascii").rstrip("=")
    response.headers["X-Next-Cursor"] = cursor
    target = request.url.include_query_params(cursor=cursor)
    response.headers["Link"] = f'<{target.path}?{target.query}>; rel="next"'
