"""Ports of a machine through the edge, against plain TCP to the same port; many WebSockets."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Final
from urllib.parse import urlsplit

from wrenn_sandbox.host import journal
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.server_process import ServerProcess

from .api import Api
from .plain_tcp import reachable
from .report import Check, Report
from .timing import Stopwatch

REQUESTS: Final = 200
LARGE_MB: Final = 64
WEBSOCKETS: Final = 200
PLAIN, EDGE = "small request over plain TCP", "small request through the edge"
PLAIN_LARGE, EDGE_LARGE = "64 MB over plain TCP", "64 MB through the edge"
MESSAGE = "message and echo, 200 WebSockets open"
_MOST_MS_MORE: Final = 2.0
_LEAST_RATIO: Final = 0.5

_PORT: Final = 3000
_PIECE: Final = 256 * 1024
_PROGRAM: Final = f"""
import asyncio, os, socket
with open("large", "wb") as file:
    for _ in range({LARGE_MB}):
        file.write(os.urandom(1 << 20))
async def serve(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    if b"upgrade: websocket" in head.lower():
        writer.write(b"HTTP/1.1 101 Go\\r\\nConnection: upgrade\\r\\n")
        writer.write(b"Upgrade: websocket\\r\\n\\r\\n")
        while data := await reader.read(4096):
            writer.write(data)
    elif head.startswith(b"GET /large"):
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: {LARGE_MB << 20}\\r\\n\\r\\n")
        with open("large", "rb") as file:
            await asyncio.get_running_loop().sendfile(writer.transport, file)
    else:
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
    writer.close()
listener = socket.create_server(("0.0.0.0", {_PORT}), backlog=512)
if os.fork():
    os._exit(0)
os.setsid()
async def main():
    server = await asyncio.start_server(serve, sock=listener)
    await server.serve_forever()
asyncio.run(main())
"""
"""Listens before it goes to the background."""

Connect = Callable[[], socket.socket]


async def measure(settings: Settings, copies: int) -> Report:
    """Small requests turn by turn, `copies` large ones turn by turn, then the WebSockets."""
    watch = Stopwatch()
    with working_directory(settings.data_dir, "bench") as data_dir:
        overrides = {"WRENN_HOT_POOL_SIZE": "0"}
        with ServerProcess(data_dir, data_dir / "server.log", overrides) as server:
            api = await Api.open(server.url)
            with closing(api):
                sandbox = await api.create()
                await api.exec(
                    sandbox, "sh", "-c", 'exec python3 -c "$0" >/dev/null 2>&1', _PROGRAM
                )
                records = journal.records(Paths(data_dir).run)
                [record] = [each for each in records if each.sandbox_id == sandbox]
                assert record.slot.netns is not None, "user-mode networking reaches the agent only"
                port = urlsplit(server.url).port
                host = f"{_PORT}-{sandbox}.localhost:{port}"

                def through_edge() -> socket.socket:
                    return socket.create_connection(("127.0.0.1", port), timeout=120)

                with reachable(record.slot.netns, _PORT) as plain:
                    await asyncio.to_thread(_alternate, watch, plain, through_edge, host, copies)
                await asyncio.to_thread(_websockets, watch, through_edge, host)
    return _report(watch)


def _alternate(
    watch: Stopwatch, plain: Connect, through_edge: Connect, host: str, copies: int
) -> None:
    sides = ((PLAIN, PLAIN_LARGE, plain), (EDGE, EDGE_LARGE, through_edge))
    for _ in range(REQUESTS):
        for name, _, connect in sides:
            with watch.lap(name):
                assert _fetch(connect, host, "/") == 2
    for _ in range(copies):
        for _, name, connect in sides:
            with watch.lap(name):
                assert _fetch(connect, host, "/large") == LARGE_MB << 20


def _fetch(connect: Connect, host: str, path: str) -> int:
    """Bytes of the body of an answer, until the connection ends."""
    with connect() as peer:
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head, size = b"", 0
        while piece := peer.recv(_PIECE):
            if b"\r\n\r\n" in head:
                size += len(piece)
                continue
            head += piece
            size = len(head.partition(b"\r\n\r\n")[2])
        return size


def _websockets(watch: Stopwatch, connect: Connect, host: str) -> None:
    with ExitStack() as stack:
        peers = [stack.enter_context(_upgraded(connect, host)) for _ in range(WEBSOCKETS)]
        for peer in peers:
            with watch.lap(MESSAGE):
                peer.sendall(b"x" * 64)
                assert peer.recv(64) == b"x" * 64


@contextmanager
def _upgraded(connect: Connect, host: str) -> Iterator[socket.socket]:
    with connect() as peer:
        lines = (
            f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        peer.sendall(lines.encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += peer.recv(1)
        assert head.startswith(b"HTTP/1.1 101 ")
        yield peer


def _report(watch: Stopwatch) -> Report:
    report = Report("ports through the edge")
    medians = {name: report.add(name, samples).median for name, samples in watch.samples.items()}
    more = medians[EDGE] - medians[PLAIN]
    report.checks += [
        Check("ms more than plain TCP, small request", more, at_most=_MOST_MS_MORE),
        Check(
            "throughput of plain TCP's",
            medians[PLAIN_LARGE] / medians[EDGE_LARGE],
            at_least=_LEAST_RATIO,
        ),
        Check("WebSockets open at once", len(watch.samples[MESSAGE]), at_least=WEBSOCKETS),
    ]
    return report
