"""An application on a port of this machine, in the test's own loop."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from wrenn_sandbox.cli.sockets import MESSAGE_LIMIT, PING_SECONDS, WebSocketProtocol


class _Listener(uvicorn.Server):
    """Says on which port it listens."""

    def __init__(self, app: FastAPI, ping_interval: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                port=0,
                lifespan="off",
                log_config=None,
                access_log=False,
                ws=WebSocketProtocol,
                ws_max_size=MESSAGE_LIMIT,
                ws_ping_interval=ping_interval,
                ws_ping_timeout=None,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=10,
            )
        )
        self.port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.port.set_result(self.servers[0].sockets[0].getsockname()[1])


@asynccontextmanager
async def listening(app: FastAPI, ping_interval: float = PING_SECONDS) -> AsyncIterator[int]:
    """The port on which `app`, whose lifespan has begun, is served until the end of the block."""
    server = _Listener(app, ping_interval)
    task = asyncio.create_task(server._serve())
    try:
        yield await server.port
    finally:
        server.should_exit = True
        await task
