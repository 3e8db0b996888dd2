"""Ports of a machine through the edge, against plain TCP to the same port; many WebSockets."""

import asyncio
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Final
from urllib.parse import urlsplit

from wrenn_sandbox.host import journal
from wrenn_sandbox.settings import Settings

from .api import Api, served
from .plain_tcp import reachable
from .report import Check, Report
from .timing import Stopwatch

REQUESTS: Final = 200
WEBSOCKETS: Final = 200
PLAIN, EDGE = "over plain TCP", "through the edge"
SMALL: Final = "small request"
MESSAGE: Final = "message and echo, 200 WebSockets open"
_LARGE_MB: Final = 64
_SMALL_COPIES: Final = 10
"""Of 1 MB."""

_MOST_MS_MORE: Final = 2.0
_LEAST_RATIO: Final = 0.5

_PORT: Final = 3000
_PIECE: Final = 256 * 1024
_PROGRAM: Final = f"""
import os, re, socket, threading
with open("large", "wb") as file:
    file.write(os.urandom(1 << 20) * {_LARGE_MB})
def serve(peer):
    buffer = bytearray({_PIECE})
    file = open("large", "rb")
    head = b""
    while piece := peer.recv_into(buffer):
        head += buffer[:piece]
        if b"\\r\\n\\r\\n" not in head:
            continue
        head, _, body = head.partition(b"\\r\\n\\r\\n")
        if b"upgrade: websocket" in head.lower():
            peer.sendall(b"HTTP/1.1 101 Go\\r\\nConnection: upgrade\\r\\n")
            peer.sendall(b"Upgrade: websocket\\r\\n\\r\\n")
            while data := peer.recv(4096):
                peer.sendall(data)
            break
        if head.startswith(b"POST"):
            left = int(re.search(b"content-length: ([0-9]+)", head.lower())[1]) - len(body)
            while left:
                left -= peer.recv_into(buffer, min(left, len(buffer)))
        megabytes = int(head.split(b" ")[1][1:] or 0)
        size = max(2, megabytes << 20)
        start = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % size
        peer.sendall(start if megabytes else start + b"ok")
        while megabytes:
            count = min(megabytes, {_LARGE_MB})
            peer.sendfile(file, 0, count << 20)
            megabytes -= count
        head = b""
    peer.close()
listener = socket.create_server(("0.0.0.0", {_PORT}), backlog=512)
if os.fork():
    os._exit(0)
os.setsid()
while True:
    peer = listener.accept()[0]
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=serve, args=(peer,), daemon=True).start()
"""
"""Listens before it goes to the background. `GET /N` gives N MB, `POST` takes a body."""

Connect = Callable[[], socket.socket]


async def measure(settings: Settings, copies: int) -> Report:
    """Small requests turn by turn, then transfers of 1, 64 and 1024 MB, then the WebSockets."""
    watch = Stopwatch()
    with served(settings, {}) as (url, paths):
        api = await Api.open(url)
        with closing(api):
            sandbox = await api.create()
            await api.exec(sandbox, "sh", "-c", 'exec python3 -c "$0" >/dev/null 2>&1', _PROGRAM)
            records = journal.records(paths.run)
            [record] = [each for each in records if each.sandbox_id == sandbox]
            assert record.slot.netns is not None, "user-mode networking reaches the agent only"
            port = urlsplit(url).port
            host = f"{_PORT}-{sandbox}.localhost:{port}"

            def through_edge() -> socket.socket:
                return socket.create_connection(("127.0.0.1", port), timeout=120)

            with reachable(record.slot.netns, _PORT) as plain:
                sides = {PLAIN: plain, EDGE: through_edge}
                await asyncio.to_thread(_alternate, watch, sides, host, copies)
            await asyncio.to_thread(_websockets, watch, through_edge, host)
    return _report(watch, copies)


def _transfers(copies: int) -> Iterator[tuple[str, int, int]]:
    """Name, megabytes and how often."""
    for megabytes, times in ((1, _SMALL_COPIES), (_LARGE_MB, copies), (1024, 1)):
        for way in ("down", "up"):
            yield f"{megabytes} MB {way}", megabytes, times


def _alternate(watch: Stopwatch, sides: Mapping[str, Connect], host: str, copies: int) -> None:
    with ExitStack() as stack:
        clients = {
            side: _Client(stack.enter_context(connect()), host) for side, connect in sides.items()
        }
        for _ in range(REQUESTS):
            for side, client in clients.items():
                with watch.lap(f"{SMALL} {side}"):
                    client.get(0)
    for name, megabytes, times in _transfers(copies):
        for _ in range(times):
            for side, connect in sides.items():
                with connect() as peer:
                    client = _Client(peer, host)
                    with watch.lap(f"{name} {side}"):
                        (client.get if "down" in name else client.post)(megabytes)


class _Client:
    """Requests on one connection that stays."""

    def __init__(self, peer: socket.socket, host: str) -> None:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = peer
        self._host = host
        self._buffer = bytearray(_PIECE)

    def get(self, megabytes: int) -> None:
        """Receive so much; two bytes for 0."""
        head = f"GET /{megabytes or ''} HTTP/1.1\r\nHost: {self._host}\r\n\r\n"
        self._peer.sendall(head.encode())
        self._receive(max(2, megabytes << 20))

    def post(self, megabytes: int) -> None:
        """Send so much, and wait until it has arrived."""
        lines = f"Host: {self._host}\r\nContent-Length: {megabytes << 20}\r\n\r\n"
        self._peer.sendall(f"POST / HTTP/1.1\r\n{lines}".encode())
        for _ in range((megabytes << 20) // _PIECE):
            self._peer.sendall(self._buffer)
        self._receive(2)

    def _receive(self, size: int) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self._peer.recv(4096)
            assert piece, "the connection ended"
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        left = size - len(body)
        while left:
            count = self._peer.recv_into(self._buffer, min(left, _PIECE))
            assert count, "the connection ended"
            left -= count


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


def _report(watch: Stopwatch, copies: int) -> Report:
    report = Report("ports through the edge")
    medians = {name: report.add(name, samples).median for name, samples in watch.samples.items()}
    more = medians[f"{SMALL} {EDGE}"] - medians[f"{SMALL} {PLAIN}"]
    report.checks.append(
        Check("ms more than plain TCP, small request", more, at_most=_MOST_MS_MORE)
    )
    for name, _, _ in _transfers(copies):
        ratio = medians[f"{name} {PLAIN}"] / medians[f"{name} {EDGE}"]
        report.checks.append(Check(f"{name}: of plain TCP's speed", ratio, at_least=_LEAST_RATIO))
    report.checks.append(
        Check("WebSockets open at once", len(watch.samples[MESSAGE]), at_least=WEBSOCKETS)
    )
    return report
