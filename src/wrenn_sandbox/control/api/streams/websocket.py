"""WebSockets that carry JSON messages: credentials, limits of time, errors, closing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Literal, TypeVar

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from wrenn_sandbox.control.api.authentication import (
    caller_of_connection,
    caller_of_secret,
    has_credentials,
)
from wrenn_sandbox.control.api.errors import INTERNAL, invalid, note_error
from wrenn_sandbox.control.api.fields import RequestModel
from wrenn_sandbox.control.api.services import Services, services_of
from wrenn_sandbox.control.service.callers import Caller
from wrenn_sandbox.errors import InvalidRequest, Unauthorized, WrennError
from wrenn_sandbox.ids import TeamId

from .frames import Failure, Frame

Model = TypeVar("Model", bound=BaseModel)

AUTH_SECONDS: Final = 5.0
START_SECONDS: Final = 10.0
NORMAL: Final = 1000
NO_LONGER: Final = "The credential is no longer valid"
_REFUSED: Final = 4000
"""Plus an HTTP status: why a connection was refused after the upgrade."""

LOST_EVENT: Final = "wrenn.lost"
"""Key of the scope's state where the server keeps an event that is set when a client is gone."""


class AuthMessage(RequestModel):
    type: Literal["auth"]
    token: str


class Lost(Exception):
    """The client has gone."""


class Malformed(InvalidRequest):
    """A message that is not acceptable, or that did not come in time."""


class Socket:
    """One connection, from its upgrade to its close."""

    def __init__(self, websocket: WebSocket, subprotocol: str | None = None) -> None:
        self._websocket = websocket
        offered = websocket.scope.get("subprotocols") or []
        self.subprotocol = subprotocol if subprotocol in offered else None
        """The one that is spoken: the given one, where the client offers it."""
        self._accepted = False
        self._closed = False
        self.begun = False
        """The client has said what it wants: from here on an error closes normally."""
        lost = websocket.scope.get("state", {}).get(LOST_EVENT)
        self.lost = lost if isinstance(lost, asyncio.Event) else asyncio.Event()
        """Set when the connection breaks, where the server can tell without a read."""
        self.revoked = asyncio.Event()
        """Set when the caller may not be here any more."""

    @asynccontextmanager
    async def reporting(self) -> AsyncIterator[None]:
        """Errors of the block as the last frame, or as an HTTP answer before the upgrade."""
        try:
            yield
        except Lost:
            self._closed = True
        except WrennError as error:
            if not self._accepted:
                raise
            await self.fail(error)
        except Exception:
            if self._accepted:
                await self.fail(INTERNAL)
            raise

    @asynccontextmanager
    async def authenticated(self) -> AsyncIterator[TeamId]:
        """The caller's team, by the headers of the upgrade or by the first message.

        During the block `revoked` tells whether the credential still counts.
        """
        services = services_of(self._websocket)
        caller = await self._caller(services)
        with services.revocations.following(caller) as self.revoked:
            yield caller.team_id

    async def _caller(self, services: Services) -> Caller:
        if has_credentials(self._websocket):
            return await caller_of_connection(self._websocket, services)
        await self.accept()
        message = await self.receive(TypeAdapter(AuthMessage), AUTH_SECONDS, "auth")
        return await caller_of_secret(message.token, services)

    async def accept(self) -> None:
        """Complete the upgrade, unless that is done."""
        if self._accepted:
            return
        connect = await self._websocket.receive()
        if connect["type"] != "websocket.connect":
            raise Lost
        await self._websocket.accept(self.subprotocol)
        self._accepted = True

    async def receive(
        self, kind: TypeAdapter[Model], seconds: float | None = None, wanted: str = ""
    ) -> Model:
        """The next message; raises `Malformed` for another one or after `seconds`, and `Lost`."""
        try:
            async with asyncio.timeout(seconds):
                content = await self.content()
        except TimeoutError as error:
            raise Malformed(f"Send {wanted} within {seconds:.0f} s") from error
        return parsed(kind, content)

    async def content(self) -> str | bytes:
        """What the next text or binary frame holds; raises `Lost`."""
        message = await self._websocket.receive()
        if message["type"] != "websocket.receive":
            raise Lost
        text: str | None = message.get("text")
        return text if text is not None else message.get("bytes") or b""

    async def first(self, kind: TypeAdapter[Model], wanted: str) -> Model:
        """The message that says what the client wants, in `START_SECONDS`; as `receive`.

        Raises `Unauthorized` where the credential was taken away while it was waited for.
        """
        message = await self.receive(kind, START_SECONDS, wanted)
        if self.revoked.is_set():
            raise Unauthorized(NO_LONGER)
        self.begun = True
        return message

    async def send(self, frame: Frame | bytes) -> None:
        """Send a frame, bytes as they are, waiting for a slow reader; raises `Lost`."""
        if self._closed:
            raise Lost
        try:
            if isinstance(frame, bytes):
                await self._websocket.send_bytes(frame)
            else:
                await self._websocket.send_text(msgspec.json.encode(frame).decode("utf-8"))
        except (WebSocketDisconnect, RuntimeError) as error:
            raise Lost from error

    async def fail(self, error: WrennError) -> None:
        """Send `error` as the last frame and close."""
        refused = isinstance(error, Malformed | Unauthorized) or not self.begun
        code = _REFUSED + error.status if refused else NORMAL
        note_error(self._websocket.scope, error.code)
        try:
            await self.send(Failure.of(error))
            await self.close(code, error.message)
        except Lost:
            return

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close, once; a close frame has room for 123 bytes of reason."""
        if self._closed:
            return
        self._closed = True
        short = reason.encode("utf-8")[:120].decode("utf-8", "ignore")
        try:
            await self._websocket.close(code, short)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise Lost from error


def parsed(kind: TypeAdapter[Model], content: str | bytes) -> Model:
    """The message in a frame; raises `Malformed` for what is none of `kind`."""
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        raise Malformed(
            invalid(error.errors(include_url=False, include_input=False)).message
        ) from error
