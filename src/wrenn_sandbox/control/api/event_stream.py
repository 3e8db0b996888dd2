"""`/v1/events`: what happens to what the caller's team has, as it happens and looked up later.

The stream is `text/event-stream` of the HTML standard. Its messages have an id and data and no
name, so `onmessage` gets all of them.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from wrenn_sandbox.aio import beside
from wrenn_sandbox.control.service.events import Follower, Message
from wrenn_sandbox.control.store.records import Position, TeamEvent
from wrenn_sandbox.errors import Gone, InvalidRequest

from .authentication import AnyCaller, CallerTeam
from .events import before_number
from .fields import ResponseModel
from .middleware import HEAD_ALONE
from .paging import PageDependency
from .responses import HeldResponse, failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/events", tags=["events"])

STOPPING_EVENT: Final = "wrenn.stopping"
"""Key of the scope's state where the server keeps an event that is set when it stops."""

KEEPALIVE_SEC: Final = 15.0
SLOW_SEC: Final = 30.0
"""How long a reader may take for a batch of events beyond what the system holds for it."""

_LISTED: Final = 100
RETRY_MS: Final = 2000
_ID: Final = re.compile(r"[0-9]{1,18}")
_MEDIA_TYPE: Final = "text/event-stream"
_LINE_ENDS: Final = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}
"""Some readers end a line at these, which JSON need not escape. Names and reasons may have them."""


class Event(ResponseModel):
    """Something that happened. Ids are numbers, one after the other for each team."""

    id: str
    team_id: str
    type: str
    time: datetime
    data: dict[str, str]

    @classmethod
    def told(cls, event: TeamEvent) -> "Event":
        return cls(
            id=str(event.number),
            team_id=event.team_id,
            type=event.type,
            time=event.at,
            data=msgspec.json.decode(event.data, type=dict[str, str]),
        )


@router.get(
    "",
    operation_id="listEvents",
    responses=failures(400, 401),
)
async def list_events(
    team_id: CallerTeam, services: ServicesDependency, page: PageDependency
) -> list[Event]:
    """The last 10000 events of seven days, newest first; 100 at once, or as `limit` says."""
    page = page if page.limit is not None else replace(page, limit=_LISTED)
    found = await services.events.page(team_id, page.one_more, before_number(page))
    shown = page.cut(found, lambda last: Position(last.at, str(last.number)))
    return [Event.told(event) for event in shown]


@router.get(
    "/stream",
    operation_id="streamEvents",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events; the data of each is an `Event`",
            "content": {_MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **failures(400, 401, 410, 429),
    },
)
async def stream_events(
    request: Request,
    caller: AnyCaller,
    services: ServicesDependency,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", description="Goes on behind this event")
    ] = None,
    after: Annotated[str | None, Query(description="The same, where no header can be set")] = None,
) -> Response:
    """What happens from now on, or has happened since an event, until the caller hangs up.

    It ends when the server stops, when the credential is deleted or its user disabled, and for a
    reader that is too slow: connect again with the last id.
    """
    position = _position(last_event_id or after)

    @asynccontextmanager
    async def stream() -> AsyncIterator[Response]:
        with (
            services.events.follow(caller) as follower,
            services.revocations.following(caller) as revoked,
        ):
            await follower.begin(position)
            yield EventStream(follower, revoked)

    return HeldResponse(stream())


def _position(id: str | None) -> int | None:
    if not id:
        return None
    if not _ID.fullmatch(id):
        raise InvalidRequest("Last-Event-ID, or after, must be the id of an event")
    return int(id)


class EventStream(Response):
    """The events that a follower hands out, as long as somebody reads them and may."""

    media_type = _MEDIA_TYPE

    def __init__(self, follower: Follower, revoked: asyncio.Event) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._follower = follower
        self._revoked = revoked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        if not scope.get(HEAD_ALONE):
            stopping = scope.get("state", {}).get(STOPPING_EVENT) or asyncio.Event()
            async with (
                beside(self._write(send)) as writing,
                beside(_lost(receive)) as lost,
                beside(self._revoked.wait()) as revoked,
                beside(stopping.wait()) as stopped,
            ):
                await asyncio.wait(
                    (writing, lost, revoked, stopped), return_when=asyncio.FIRST_COMPLETED
                )
            if lost.done() and not lost.cancelled():
                return
            if writing.done() and not writing.cancelled() and not writing.result():
                return
        await send({"type": "http.response.body", "body": b""})

    async def _write(self, send: Send) -> bool:
        """Send until there is nothing more to have; false where the reader is too slow."""
        text = f"retry: {RETRY_MS}\nid: {self._follower.position}\n\n"
        while True:
            try:
                async with asyncio.timeout(SLOW_SEC):
                    await send(
                        {"type": "http.response.body", "body": text.encode(), "more_body": True}
                    )
            except TimeoutError:
                return False
            try:
                found = await self._follower.next(KEEPALIVE_SEC)
            except Gone:
                return True
            text = "".join(map(_message, found)) or ": keepalive\n\n"


def _message(event: TeamEvent) -> str:
    data = msgspec.json.encode(Message.of(event)).decode("utf-8")
    return f"id: {event.number}\ndata: {data.translate(_LINE_ENDS)}\n\n"


async def _lost(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
