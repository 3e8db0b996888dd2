"""`limit` and `cursor` of lists, and the headers that name the next page."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, TypeVar

from fastapi import Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from wrenn_sandbox.control.store.records import Position
from wrenn_sandbox.errors import InvalidRequest

Row = TypeVar("Row")

_LIMIT_MAX = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Page:
    """What a caller asked for; without a limit the whole list."""

    request: Request
    response: Response
    limit: int | None
    after: Position | None

    @property
    def one_more(self) -> int | None:
        """How many rows to read in order to know whether there is another page."""
        return None if self.limit is None else self.limit + 1

    def cut(self, found: list[Row], position: Callable[[Row], Position]) -> list[Row]:
        """The rows of this page; the headers say where the next begins, if `found` has more."""
        shown = found[: self.limit]
        if len(found) > len(shown):
            cursor = cursor_of(position(shown[-1]))
            target = self.request.url.include_query_params(cursor=cursor)
            self.response.headers["X-Next-Cursor"] = cursor
            self.response.headers["Link"] = f'<{target.path}?{target.query}>; rel="next"'
        return shown


async def _page(
    request: Request,
    response: Response,
    limit: Annotated[int | None, Query(ge=1, le=_LIMIT_MAX)] = None,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Page:
    return Page(request, response, limit, None if cursor is None else position_of(cursor))


PageDependency = Annotated[Page, Depends(_page)]


def cursor_of(position: Position) -> str:
    """What a caller sends to have the list from there on."""
    text = f"{(position.at - _EPOCH) // _MICROSECOND}:{position.key}"
    return base64.urlsafe_b64encode(text.encode("ascii")).decode("ascii").rstrip("=")


def position_of(cursor: str) -> Position:
    """The place that a cursor stands for; raises `InvalidRequest`."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        micros, _, key = (
            base64.b64decode(padded, b"-_", validate=True).decode("ascii").partition(":")
        )
        at = _EPOCH + int(micros) * _MICROSECOND
    except (ValueError, OverflowError) as error:
        raise bad_cursor() from error
    if "\0" in key:
        raise bad_cursor()
    return Position(at, key)


def bad_cursor() -> InvalidRequest:
    return InvalidRequest("cursor: take it from the X-Next-Cursor header")
