"""An application on a listening socket: uvicorn's server with this server's edge."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp

from wrenn_sandbox.control.api.forwarded import TrustedProxies
from wrenn_sandbox.settings import EdgeSettings

from .connections import ConnectionPermit, Connections
from .http_protocol import HttpProtocol, Timeouts
from .listener import Listener
from .tls import Certificate
from .websocket_protocol import MESSAGE_LIMIT, PING_SECONDS, WebSocketProtocol

_log = structlog.get_logger(__name__)
_BACKLOG: Final = 1024
_TICKS_PER_CHECK: Final = 10
"""A tick is a tenth of a second."""


class HttpServer(uvicorn.Server):
    """Leaves signals and the application's lifespan to its owner.

    `on_ready` is told the URL as soon as connections are accepted. With a `certificate` that URL
    is an https one, and nothing else is spoken.
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
                timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_sec)),
            )
        )
        self._socket = listener
        self._certificate = certificate
        self._on_ready = on_ready
        self._patience = Timeouts(
            head=settings.head_timeout_sec,
            body=settings.body_timeout_sec,
            write=settings.write_timeout_sec,
        )
        self.connections = Connections(
            total=settings.max_connections,
            per_address=settings.max_connections_per_address,
            trusted=TrustedProxies(settings.trusted_proxies),
        )
        self._listener = Listener(
            self.connections,
            self._protocol,
            certificate,
            handshake_seconds=settings.head_timeout_sec,
        )

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
            helpers = [tasks.create_task(self._listener.run(self._socket))]
            if self._certificate is not None:
                helpers.append(tasks.create_task(self._certificate.watch()))
            self._on_ready(self.url)
            await super().main_loop()
            self._socket.close()
            for helper in helpers:
                helper.cancel()

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_CHECK == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, HttpProtocol | WebSocketProtocol):
                    _check(connection, now)
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def _protocol(self, place: ConnectionPermit) -> HttpProtocol:
        return HttpProtocol(self.config, self.server_state, {}, self._patience, place)


def _check(connection: HttpProtocol | WebSocketProtocol, now: float) -> None:
    """One connection's trouble is not the others'."""
    try:
        connection.check(now)
    except Exception:
        _log.exception("a connection could not be looked after")
        connection.transport.abort()
