"""A server on a port of this machine, in a thread with a loop of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from support.api_server import CHEAP
from support.listening import edge
from support.serializing_host import serializing_host
from wrenn_sandbox.control.app import create_app
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.host import Host


@contextmanager
def live_server(settings: Settings, host: Host) -> Iterator[str]:
    """The URL of a server that runs until the end of the block."""
    app = create_app(settings, serializing_host(host), hasher=CHEAP)
    ready = threading.Event()
    urls: list[str] = []
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        over = asyncio.Event()
        async with app.router.lifespan_context(app), edge(app, settings) as server:
            urls.append(server.url)
            loops.append((asyncio.get_running_loop(), over))
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield urls[0]
    finally:
        for loop, over in loops:
            loop.call_soon_threadsafe(over.set)
        thread.join()
