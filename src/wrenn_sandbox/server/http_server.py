"""An application on a listening socket: uvicorn's server with this server's edge."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp

from wrenn_sandbox.control.api.event_stream import STOPPING_EVENT
from wrenn_sandbox.control.api.forwarded import TrustedProxies
from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import EdgeSettings

from .connections import Connections
from .http_protocol import HttpProtocol, refusal
from .tls import Certificate
from .websocket_protocol import MESSAGE_LIMIT, PING_SECONDS, WebSocketProtocol

_log = structlog.get_logger(__name__)
_BACKLOG: Final = 1024
_PAUSE_SECONDS: Final = 0.5
_CHECK_SECONDS: Final = 1.0


class HttpServer(uvicorn.Server):
    """Leaves signals and the application's lifespan to its owner.

    `on_ready` is told the URL as soon as connections are accepted. With a `certificate` that URL
    is an https one, and nothing else is spoken.

    A connection is counted from the moment it is accepted, so that a client in the middle of its
    handshake, which may take `head_timeout_sec`, has its place too. One that gets none is told so
    where no certificate stands in between, and closed.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: EdgeSettings,
        listener: socket.socket,
        certificate: Certificate | None = None,
        *,
        on_ready: Callable[[str], None],
        ping_seconds: float = PING_SECONDS,
    ) -> None:
        self._exit = asyncio.Event()
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=HttpProtocol,
                ws=WebSocketProtocol,
                ws_max_size=MESSAGE_LIMIT,
                ws_ping_interval=ping_seconds,
                ws_ping_timeout=None,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.keep_alive_sec,  # type: ignore[arg-type]
                timeout_graceful_shutdown=max(1, round(patience(settings.shutdown_grace_sec))),
            )
        )
        self._socket = listener
        self._certificate = certificate
        self._on_ready = on_ready
        self._settings = settings
        self.connections = Connections(
            total=settings.max_connections,
            per_address=settings.max_connections_per_address,
            trusted=TrustedProxies(settings.trusted_proxies),
        )

    @property
    def should_exit(self) -> bool:
        """To be set in the server's own thread; it stops at once then."""
        return self._exit.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._exit.set()
        else:
            self._exit.clear()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        scheme = "http" if self._certificate is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers = []
        self._socket.listen(_BACKLOG)
        self.started = True

    async def main_loop(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(self._accept())]
            if self._certificate is not None:
                helpers.append(tasks.create_task(self._certificate.watch()))
            self._on_ready(self.url)
            while not await self.on_tick(0):
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CHECK_SECONDS):
                        await self._exit.wait()
            self._socket.close()
            for helper in helpers:
                helper.cancel()

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpProtocol | WebSocketProtocol):
                _check(connection, now)
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def _accept(self) -> None:
        """Let connections in until cancelled, which also ends what has not got through."""
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    accepted, address = await loop.sock_accept(self._socket)
                except OSError as error:
                    _log.warning("no connection accepted", reason=error.strerror)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                try:
                    place = self.connections.admit(str(address[0]))
                except WrennError as error:
                    self._turn_away(accepted, error)
                else:
                    tasks.create_task(self._let_in(accepted, place))

    async def _let_in(self, accepted: socket.socket, place: ExitStack) -> None:
        context = None if self._certificate is None else self._certificate.context
        state: dict[str, object] = {STOPPING_EVENT: self._exit}
        done = False
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: HttpProtocol(self.config, self.server_state, state, self._settings, place),
                accepted,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._settings.head_timeout_sec,
            )
            done = True
        except OSError as error:
            _log.debug("no handshake", reason=str(error))
        except Exception:
            _log.exception("connection failed")
        finally:
            if not done:
                place.close()
                accepted.close()

    def _turn_away(self, accepted: socket.socket, error: WrennError) -> None:
        with accepted:
            accepted.setblocking(False)
            if self._certificate is None:
                try:
                    accepted.send(refusal(error, "http", ()))
                except OSError as lost:
                    _log.debug("a refusal was not heard", reason=lost.strerror)


def _check(connection: HttpProtocol | WebSocketProtocol, now: float) -> None:
    """One connection's trouble is not the others'."""
    try:
        connection.check(now)
    except Exception:
        _log.exception("a connection could not be looked after")
        connection.transport.abort()
