"""HTTP/1.1 of a guest's connection: each request is led to the host that it names, if that may be.

h11 parses both sides and writes both sides anew, so what the far side is sent is framed as it was
read here.
"""

import asyncio
import socket
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

import h11

from .connection import CHUNK, Connection, Denied, Unreachable, readable
from .names import known

PORT: Final = 80
_HEAD_LIMIT: Final = 16 * 1024
_HEADERS_LIMIT: Final = 128
_WEBSOCKET: Final = b"websocket"
_LINGER_SEC: Final = 2.0
_HEADS: Final = (h11.Request, h11.Response, h11.InformationalResponse)
Role = type[h11.CLIENT] | type[h11.SERVER]


class _Odd(Exception):
    """A request that is not passed on; `str()` says why."""


class _Ended(Exception):
    """One of the sides has ended the connection."""


class _Side:
    """One side of the connection."""

    def __init__(self, connection: Connection, sock: socket.socket, role: Role) -> None:
        self._connection = connection
        self.sock = sock
        self.http = h11.Connection(role, max_incomplete_event_size=_HEAD_LIMIT)

    async def next(self) -> h11.Event:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self._connection.receive(self.sock))
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
            await self._connection.send(self.sock, data)

    @property
    def reusable(self) -> bool:
        return self.http.our_state is h11.DONE and self.http.their_state is h11.DONE


async def serve(connection: Connection) -> None:
    """Serve a connection to its end. Raises OSError."""
    near = _Side(connection, connection.near, h11.SERVER)
    far: _Side | None = None
    try:
        while True:
            request = await _request(near, far)
            name = _named(request)
            if far is None or name != connection.name:
                far = _Side(connection, await connection.dial(name, PORT), h11.CLIENT)
            if await _exchange(near, far, request):
                rest = near.http.trailing_data[0], far.http.trailing_data[0]
                await connection.pump(*rest)
                return
            if not (near.reusable and far.reusable):
                await _linger(near.sock)
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
        await _refuse(near, HTTPStatus.BAD_REQUEST, f"The request is not passed on: {error}")
    except h11.RemoteProtocolError as error:
        if near.http.their_state is h11.ERROR:
            await _refuse(near, HTTPStatus.BAD_REQUEST, f"The request is not HTTP/1.1: {error}")
        else:
            await _refuse(near, HTTPStatus.BAD_GATEWAY, "The server's answer is not HTTP/1.1")


async def _request(near: _Side, far: _Side | None) -> h11.Request:
    """The next request; the end of the far side's connection meanwhile ends this one."""
    asking = asyncio.create_task(near.next())
    waiting = [asking]
    if far is not None:
        waiting.append(asyncio.create_task(readable(far.sock)))  # type: ignore[arg-type]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise _Ended
        request = asking.result()
    finally:
        await _cancelled(waiting)
    assert isinstance(request, h11.Request)
    return request


def _named(request: h11.Request) -> str:
    """The name of the host that a request is for; raises `_Odd`."""
    if request.method == b"CONNECT":
        raise _Odd("CONNECT is not possible")
    if not request.target.startswith(b"/") and request.target != b"*":
        raise _Odd("its target must be a path")
    names = [value for key, value in request.headers if key == b"host"]
    if len(names) != 1:
        raise _Odd("it must name one host")
    text, _, port = names[0].decode("latin-1").partition(":")
    name = known(text)
    if name is None or port not in ("", str(PORT)):
        raise _Odd("its Host is not the name of a host on port 80")
    keys = {key for key, _ in request.headers}
    if {b"content-length", b"transfer-encoding"} <= keys:
        raise _Odd("it gives its length twice")
    return name


async def _exchange(near: _Side, far: _Side, request: h11.Request) -> bool:
    """Pass a request on and its answer back; whether both sides speak another protocol then."""
    await far.send(
        h11.Request(method=request.method, target=request.target, headers=_passed(request))
    )
    up = asyncio.create_task(_pass_body(near, far))
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


async def _pass_body(near: _Side, far: _Side) -> None:
    """Pass on what follows a request's head; then wait for more than that, or an end."""
    event = None
    while not isinstance(event, h11.EndOfMessage):
        event = await near.next()
        await far.send(event)
    await readable(near.sock)
    if not near.sock.recv(1, socket.MSG_PEEK):
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
    await _linger(near.sock)


async def _linger(sock: socket.socket) -> None:
    """Let the guest read what it was sent: to close before it has sent all would take it away."""
    sock.shutdown(socket.SHUT_WR)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_LINGER_SEC):
            while await loop.sock_recv(sock, CHUNK):
                pass
    except TimeoutError:
        return


async def _cancelled(tasks: Iterable["asyncio.Task[object]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
