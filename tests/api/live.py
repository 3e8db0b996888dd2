"""A server on a port of this machine, in a thread with a loop of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket

import uvicorn
from fastapi import FastAPI

from api.harness import CHEAP
from wrenn_sandbox.control.app import create_app
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.host import Host


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="on")
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def live_server(settings: Settings, host: Host) -> Iterator[str]:
    """The URL of a server that runs until the end of the block."""
    listener = socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(settings, host, hasher=CHEAP)
    server = _Server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        assert server.ready.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
