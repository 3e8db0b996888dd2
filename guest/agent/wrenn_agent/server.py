"""The HTTP server: accepts connections, reads requests, finds routes, answers errors."""

from __future__ import annotations

# what `socket` wraps: making the wrapper of a connection costs more than accepting it
import _socket as socket
import errno
import select
import time

from .auth import Auth
from .connection import Connection
from .errors import (
    AgentError,
    DeadlineExceeded,
    Disconnected,
    HeadersTooLarge,
    MethodNotAllowed,
    NotFound,
)
from .exchange import Exchange
from .http import HEAD_LIMIT, Head, parse_head
from .loop import Loop, report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Route = Callable[[Exchange], Awaitable[None]]

_BACKLOG = 1024
_MAX_CONNECTIONS = 768
_ACCEPT_PAUSE = 0.2
_HEAD_SECONDS = 30.0
_TEMPORARY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Server:
    """Serves `routes` (path -> method -> route) on one listening socket."""

    def __init__(self, loop: Loop, auth: Auth, routes: dict[str, dict[str, Route]]) -> None:
        self._loop = loop
        self._auth = auth
        self._routes = routes
        self._connections: dict[Connection, None] = {}
        self._listener: socket.socket

    def listen(self, host: str, port: int) -> int:
        """Start to accept connections; returns the port."""
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # accepted sockets inherit these
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        listener.setblocking(False)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        self._listener = listener
        self._resume_accepting()
        return int(listener.getsockname()[1])

    def drop_others(self, kept: Connection) -> None:
        """End every connection but one; those who served them see Disconnected."""
        for connection in list(self._connections):
            if connection is not kept:
                connection.drop()

    def _resume_accepting(self) -> None:
        self._loop.register(self._listener.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, _events: int) -> None:
        if len(self._connections) >= _MAX_CONNECTIONS and not self._make_room():
            self._pause_accepting()
            return
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in _TEMPORARY and not self._make_room():
                self._pause_accepting()
            return  # where room was made, the next round accepts
        sock = socket.socket(self._listener.family, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        connection = Connection(self._loop, sock, self._forget)
        self._connections[connection] = None
        connection.owner = self._loop.spawn(self._serve(connection))

    def _pause_accepting(self) -> None:
        self._loop.unregister(self._listener.fileno())
        self._loop.call_later(_ACCEPT_PAUSE, self._resume_accepting)

    def _make_room(self) -> bool:
        for connection in self._connections:
            if connection.idle:
                connection.drop()
                return True
        return False

    def _forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    async def _serve(self, connection: Connection) -> None:
        try:
            connection.receive_now()  # mostly the request is there: the loop need not be asked
            while await self._serve_one(connection):
                pass
        except Disconnected:
            pass
        except AgentError as error:  # a request that cannot even be read, or lingered too long
            await self._refuse(connection, error)
        finally:
            connection.close()

    async def _serve_one(self, connection: Connection) -> bool:
        head = await _read_head(connection)
        if head is None:
            return False
        exchange = Exchange(connection, head)
        try:
            route = self._find_route(head)
            self._auth.admit(exchange)
            await route(exchange)
        except Disconnected:
            raise
        except AgentError as error:
            await self._reply_error(exchange, error)
        except Exception as unexpected:
            report(unexpected)
            await self._reply_error(exchange, AgentError("internal error of the guest agent"))
        if exchange.reusable:
            return True
        if not connection.torn and not exchange.body.finished:
            await exchange.linger()
        return False

    async def _reply_error(self, exchange: Exchange, error: AgentError) -> None:
        if exchange.answered or exchange.connection.torn:
            raise Disconnected  # too late to say anything: cut, never end cleanly
        await exchange.reply_error(error)

    async def _refuse(self, connection: Connection, error: AgentError) -> None:
        if connection.torn or isinstance(error, DeadlineExceeded):
            return
        exchange = Exchange(connection, Head("GET", "", {}, "HTTP/1.1", {"connection": "close"}))
        try:
            await exchange.reply_error(error)
            await exchange.linger()
        except (Disconnected, AgentError):
            return

    def _find_route(self, head: Head) -> Route:
        methods = self._routes.get(head.path)
        if methods is None:
            raise NotFound("no such path")
        route = methods.get(head.method)
        if route is None:
            raise MethodNotAllowed("method not allowed here")
        return route


async def _read_head(connection: Connection) -> Head | None:
    """The next request, None when the client closes (or has nothing to say for long)."""
    buffer = connection.buffer
    connection.idle = True
    deadline: float | None = None
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        if len(buffer) > HEAD_LIMIT:
            raise HeadersTooLarge(f"request head is larger than {HEAD_LIMIT} bytes")
        if buffer == b"\r\n":
            buffer.clear()
        connection.idle = not buffer
        if buffer and deadline is None:
            deadline = time.monotonic() + _HEAD_SECONDS
        if not await connection.receive(deadline and deadline - time.monotonic()):
            return None
    connection.idle = False
    if end > HEAD_LIMIT:
        raise HeadersTooLarge(f"request head is larger than {HEAD_LIMIT} bytes")
    head = bytes(buffer[:end]).lstrip(b"\r\n")
    del buffer[: end + 4]
    return parse_head(head)
