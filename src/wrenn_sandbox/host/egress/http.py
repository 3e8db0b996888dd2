"""HTTP/1.1 of a guest's connection: each request is led to the host that it names, if that may be.

h11 parses both sides and writes both sides anew, so what the far side is sent is framed as it was
read here. Where TLS has been ended for a host, requests are led to that host alone, and get headers
in place of those of the guest.
"""

import asyncio
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Final, Protocol

import h11

from .connection import Connection, Denied, Unreachable
from .names import known
from .stream import Stream, pump

PORT: Final = 80
TLS_PORT: Final = 443
_HEAD_LIMIT: Final = 16 * 1024
_HEADERS_LIMIT: Final = 128
_WEBSOCKET: Final = b"websocket"
_HEADS: Final = (h11.Request, h11.Response, h11.InformationalResponse)
Role = type[h11.CLIENT] | type[h11.SERVER]


Headers = Sequence[tuple[str, str]]


class Inside(Protocol):
    """The inside of TLS for one host, `name`."""

    name: str

    @property
    def near(self) -> Stream: ...

    async def dial(self) -> Stream:
        """The host, anew. Raises `Denied` and `Unreachable`."""
        ...

    def headers(self) -> Headers:
        """What requests get as of now, in place of what they have under these names."""
        ...


class _Odd(Exception):
    """A request that is not passed on; `str()` says why."""

    def __init__(self, why: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(why)
        self.status = status


class _Ended(Exception):
    """One of the sides has ended the connection."""


class _Side:
    """One side of the connection."""

    def __init__(self, stream: Stream, role: Role) -> None:
        self.stream = stream
        self.http = h11.Connection(role, max_incomplete_event_size=_HEAD_LIMIT)

    async def next(self) -> h11.Event:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.stream.receive())
        if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            raise _Ended
        assert not isinstance(event, type)
        if isinstance(event, _HEADS) and len(event.headers) > _HEADERS_LIMIT:
            if self.http.our_role is h11.SERVER:
                raise _Odd("it has too many headers")
            raise h11.RemoteProtocolError("too many headers")
        return event

    async def send(self, event: h11.Event) -> None:
        if data := self.http.send(event):
            await self.stream.send(data)

    @property
    def reusable(self) -> bool:
        return self.http.our_state is h11.DONE and self.http.their_state is h11.DONE


async def serve(connection: Connection, inside: Inside | None = None) -> None:
    """Serve a connection to its end. Raises OSError."""
    near = _Side(Stream(connection, connection.near) if inside is None else inside.near, h11.SERVER)
    far: _Side | None = None
    try:
        while True:
            request = await _request(near, far)
            name = _named(request, inside)
            if far is None or name != connection.name:
                far = _Side(await _dial(connection, name, inside), h11.CLIENT)
            headers = () if inside is None else inside.headers()
            if await _exchange(near, far, request, headers):
                rest = near.http.trailing_data[0], far.http.trailing_data[0]
                await pump(near.stream, far.stream, *rest)
                return
            if not (near.reusable and far.reusable):
                await near.stream.linger()
                return
            near.http.start_next_cycle()
            far.http.start_next_cycle()
    except (_Ended, h11.LocalProtocolError):
        return
    except Denied as error:
        await _refuse(near, HTTPStatus.FORBIDDEN, str(error))
    except Unreachable as error:
        await _refuse(near, HTTPStatus.BAD_GATEWAY, str(error))
    except _Odd as error:
        await _refuse(near, error.status, f"The request is not passed on: {error}")
    except h11.RemoteProtocolError as error:
        if near.http.their_state is h11.ERROR:
            await _refuse(near, HTTPStatus.BAD_REQUEST, f"The request is not HTTP/1.1: {error}")
        else:
            await _refuse(near, HTTPStatus.BAD_GATEWAY, "The server's answer is not HTTP/1.1")


async def _dial(connection: Connection, name: str, inside: Inside | None) -> Stream:
    if inside is not None:
        return await inside.dial()
    return Stream(connection, await connection.dial(name, PORT))


async def _request(near: _Side, far: _Side | None) -> h11.Request:
    """The next request; the end of the far side's connection meanwhile ends this one."""
    asking = asyncio.create_task(near.next())
    waiting = [asking]
    if far is not None:
        waiting.append(asyncio.create_task(far.stream.ready()))  # type: ignore[arg-type]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise _Ended
        request = asking.result()
    finally:
        await _cancelled(waiting)
    assert isinstance(request, h11.Request)
    return request


def _named(request: h11.Request, inside: Inside | None) -> str:
    """The name of the host that a request is for; raises `_Odd`."""
    if request.method == b"CONNECT" or (inside is not None and request.method == b"TRACE"):
        raise _Odd(f"{request.method.decode()} is not possible")  # TRACE is answered with headers
    if not request.target.startswith(b"/") and request.target != b"*":
        raise _Odd("its target must be a path")
    names = [value for key, value in request.headers if key == b"host"]
    if len(names) != 1:
        raise _Odd("it must name one host")
    text, _, port = names[0].decode("latin-1").partition(":")
    name = known(text)
    expected = PORT if inside is None else TLS_PORT
    if name is None or port not in ("", str(expected)):
        raise _Odd(f"its Host is not the name of a host on port {expected}")
    if inside is not None and name != inside.name:
        raise _Odd(
            f"it is for {name}, and the connection for {inside.name}",
            HTTPStatus.MISDIRECTED_REQUEST,
        )
    keys = {key for key, _ in request.headers}
    if {b"content-length", b"transfer-encoding"} <= keys:
        raise _Odd("it gives its length twice")
    return name


async def _exchange(near: _Side, far: _Side, request: h11.Request, headers: Headers) -> bool:
    """Pass a request on and its answer back; whether both sides speak another protocol then."""
    passed = _replaced(_passed(request), headers)
    await far.send(h11.Request(method=request.method, target=request.target, headers=passed))
    up = asyncio.create_task(_pass_body(near, far, trailers=not headers))
    down = asyncio.create_task(_pass_answer(far, near))
    try:
        await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            up.result()
        return await down
    finally:
        await _cancelled([up, down])


def _passed(request: h11.Request) -> list[tuple[bytes, bytes]]:
    """The headers of a request as they are, but no offer of another protocol than WebSocket.

    By HTTP/2, for one, a guest could ask the same server for what it has for other names.
    """
    headers = request.headers.raw_items()
    offered = [value.strip().lower() for key, value in request.headers if key == b"upgrade"]
    if offered in ([], [_WEBSOCKET]):
        return headers
    kept = []
    for key, value in headers:
        if key.lower() == b"connection":
            options = [each.strip() for each in value.split(b",")]
            stay = [each for each in options if each.lower() in (b"close", b"keep-alive")]
            if stay:
                kept.append((key, b", ".join(stay)))
        elif key.lower() not in (b"upgrade", b"http2-settings"):
            kept.append((key, value))
    return kept


def _replaced(passed: list[tuple[bytes, bytes]], headers: Headers) -> list[tuple[bytes, bytes]]:
    """Some headers in place of others, which also may not be called those of the connection."""
    if not headers:
        return passed
    names = {name.lower().encode() for name, _ in headers}
    kept = []
    for key, value in passed:
        if key.lower() == b"connection":
            options = [each.strip() for each in value.split(b",")]
            value = b", ".join(each for each in options if each and each.lower() not in names)
        if key.lower() not in names and (value or key.lower() != b"connection"):
            kept.append((key, value))
    return kept + [(name.encode(), value.encode()) for name, value in headers]


async def _pass_body(near: _Side, far: _Side, *, trailers: bool) -> None:
    """Pass on what follows a request's head; then wait for more than that, or an end."""
    event = None
    while not isinstance(event, h11.EndOfMessage):
        event = await near.next()
        if isinstance(event, h11.EndOfMessage) and not trailers:
            event = h11.EndOfMessage()
        await far.send(event)
    if not await near.stream.ready():
        raise _Ended


async def _pass_answer(far: _Side, near: _Side) -> bool:
    while True:
        event = await far.next()
        if isinstance(event, h11.Response | h11.InformationalResponse):
            headers = event.headers.raw_items()  # of HTTP/1.0 too, which h11 does not write
            event = type(event)(status_code=event.status_code, reason=event.reason, headers=headers)
        await near.send(event)
        if isinstance(event, h11.InformationalResponse):
            if event.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
                return True
        elif isinstance(event, h11.EndOfMessage):
            return False


async def _refuse(near: _Side, status: HTTPStatus, why: str) -> None:
    """Answer in the far side's place, where no answer has begun."""
    if near.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    body = f"{why}\n".encode()
    headers = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    answer = h11.Response(status_code=status, reason=status.phrase.encode(), headers=headers)
    for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
        await near.send(event)
    await near.stream.linger()


async def _cancelled(tasks: Iterable["asyncio.Task[object]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
