"""An application on a port of this machine, in the test's own loop, behind the server's edge."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import ASGIApp

from wrenn_sandbox.server.http_server import HttpServer
from wrenn_sandbox.server.tls import Certificate
from wrenn_sandbox.server.websocket_protocol import PING_SECONDS
from wrenn_sandbox.settings import Settings


@asynccontextmanager
async def edge(
    app: ASGIApp,
    settings: Settings,
    certificate: Certificate | None = None,
    *,
    host: str = "127.0.0.1",
    ping_seconds: float = PING_SECONDS,
) -> AsyncIterator[HttpServer]:
    """The server of `app`, whose lifespan has begun, until the end of the block."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        ready = asyncio.Event()
        server = HttpServer(
            app,
            settings,
            listener,
            certificate,
            on_ready=lambda _: ready.set(),
            ping_seconds=ping_seconds,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve())
            await ready.wait()
            try:
                yield server
            finally:
                server.should_exit = True


@asynccontextmanager
async def listening(app: ASGIApp, ping_interval: float = PING_SECONDS) -> AsyncIterator[int]:
    """The port on which `app`, whose lifespan has begun, is served until the end of the block."""
    settings = Settings(shutdown_grace_sec=10)
    async with edge(app, settings, ping_seconds=ping_interval) as server:
        yield server.port
