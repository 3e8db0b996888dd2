"""The server's edge over real sockets: what is refused, how long it waits, how much it takes."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from starlette.types import Receive, Scope, Send

from support.api_server import eventually
from support.listening import edge, listening
from wrenn_sandbox.server import http_protocol, http_server, turns, websocket_protocol
from wrenn_sandbox.server.http_protocol import HEADERS_LIMIT, PIPELINE_LIMIT
from wrenn_sandbox.server.http_server import HttpServer
from wrenn_sandbox.settings import Settings

_GET = b"GET /plain HTTP/1.1\r\nHost: x\r\n"
_POST = b"POST /plain HTTP/1.1\r\nHost: x\r\n"
_CHUNKED = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
_UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\n"
)
_KEY = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
_PIECE = bytes(64 * 1024)
_REFUSED = (
    # two lengths, or a length and chunks: what is smuggled past others
    (_POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (_POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
    (_POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
    (_POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
    (_POST + b"Content-Length: 3, 3\r\n\r\nabc", 400),
    (_POST + b"Content-Length: +3\r\n\r\nabc", 400),
    (_POST + b"Content-Length: -3\r\n\r\nabc", 400),
    (_POST + b"Content-Length: 0x3\r\n\r\nabc", 400),
    (_POST + b"Content-Length: \r\n\r\nabc", 400),
    (_POST + b"Content-Length: 99999999999999999999999\r\n\r\nabc", 400),
    # transfer codings
    (_POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    (_POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    (_POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    (_POST + b"Transfer-Encoding: identity\r\n\r\nabc", 400),
    (_POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (_POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (_POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    # chunks
    (_CHUNKED + b"zz\r\n", 400),
    (_CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", 400),
    (_CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n", 400),
    (_CHUNKED + b"3\nabc\n0\n\n", 400),
    (_CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", 400),
    (_CHUNKED + b"FFFFFFFFFFFFFFFFF\r\nabc\r\n", 400),
    # lines
    (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    (_GET + b"X: a\nY: b\r\n\r\n", 400),
    (_GET + b"X: a\rY: b\r\n\r\n", 400),
    (_GET + b"X: a\r\n folded\r\n\r\n", 400),
    (_GET + b"X: a\0b\r\n\r\n", 400),
    (_GET + b"X : a\r\n\r\n", 400),
    (_GET + b": a\r\n\r\n", 400),
    (_GET + b"X Y: a\r\n\r\n", 400),
    (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /\r\n\r\n", 400),
    (b"GET / HTTP/0.9\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.9\r\nHost: x\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    # hosts
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: <script>\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: u@h\r\n\r\n", 400),
    # upgrades
    (_UPGRADE + b"\r\n", 400),
    (_UPGRADE.replace(b"13", b"8") + _KEY + b"\r\n", 400),
    (_UPGRADE.replace(b"GET", b"POST") + _KEY + b"\r\n", 400),
    (_UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0") + _KEY + b"\r\n", 400),
    (_UPGRADE + _KEY + b"Content-Length: 3\r\n\r\nabc", 400),
    (_UPGRADE + _KEY + b"X: " + b"a" * 9000 + b"\r\n\r\n", 431),
    (_UPGRADE + _KEY + _KEY + b"\r\n", 400),
    (_UPGRADE + _KEY + b"Upgrade: websocket\r\n\r\n", 400),
    (_UPGRADE + _KEY + b"Origin: a\r\nOrigin: b\r\n\r\n", 400),
    (_UPGRADE + _KEY + b"Sec-WebSocket-Protocol: a b\r\n\r\n", 400),
    (_UPGRADE.replace(b"Upgrade\r", b"Upgrade, (\r", 1) + _KEY + b"\r\n", 400),
    # sizes
    (b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    (b"GET /" + b"a" * 300_000, 414),
    (b"GET /?" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    (_GET + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    (_GET + b"X: " + b"a" * 2_000_000, 431),
    (_GET + b"a" * 2_000_000, 431),
    (_GET + b"X: 1\r\n" * HEADERS_LIMIT + b"\r\n", 431),
    (_GET + (b"X: " + b"a" * 8000 + b"\r\n") * 10 + b"\r\n", 431),
    (b"\r\n" * 1_000_000, 431),
    (_CHUNKED + b"3;" + b"a" * 1_000_000, 431),
    (_CHUNKED + b"0\r\nX: " + b"a" * 1_000_000, 431),
    (_CHUNKED + b"0\r\n" + b"X: aaaaaaaaaaaaaa\r\n" * 10_000, 431),
)
_HARMLESS = (
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n",
    b"GET http://evil.example/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET //evil.example/../a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /%00%ff%2e%2e HTTP/1.1\r\nHost: [::1]:80\r\nConnection: close\r\n\r\n",
    b"\r\n\r\nGET / HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n",
    _GET + b"Connection: close\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    _GET + b"Upgrade: websocket\r\nConnection: close\r\n\r\n",
    _GET + b"X: 1\r\n" * (HEADERS_LIMIT - 2) + b"Connection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks at its connections ten times as often as in life."""
    monkeypatch.setattr(http_server, "_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 0.3)


@dataclass
class App:
    """Answers with what it has read; `/hold` waits, `/endless` writes until nobody reads."""

    bodies: list[bytes] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = scope["headers"]
        self.begun.set()
        try:
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.accept"})
                while (message := await receive())["type"] == "websocket.receive":
                    self.bodies.append(str(message.get("text")).encode())
            else:
                await self._answer(scope["path"], receive, send)
        finally:
            self.ended.set()

    async def _answer(self, path: str, receive: Receive, send: Send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if path == "/hold":
                await self.gate.wait()
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if path == "/endless":
            await self._endless(receive, send)
            return
        await send({"type": "http.response.body", "body": b"done"})

    async def _endless(self, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": _PIECE, "more_body": True})
            await asyncio.sleep(0)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _settings(**others: object) -> Settings:
    return Settings.model_validate({"shutdown_grace_sec": 1, **others})


@dataclass
class Peer:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    def pause(self) -> None:
        """Read nothing any more."""
        transport = self.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()

    async def rest(self) -> bytes:
        """All that comes until the server has closed."""
        received = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while piece := await self.reader.read(65536):
                    received += piece
        return received

    async def answer(self) -> bytes:
        """One answer with `done` as its chunk."""
        return await self.reader.readuntil(b"done\r\n0\r\n\r\n")


@asynccontextmanager
async def _peer(server: HttpServer) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def _check_refusal(answer: bytes, status: int) -> str:
    """Holds an answer of the protocol's own against the form of all others; gives its message."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    fields = {
        name.lower(): value
        for name, _, value in (line.partition(": ") for line in head.decode().split("\r\n")[1:])
    }
    assert fields["content-type"] == "application/json"
    assert fields["connection"] == "close"
    assert fields["x-request-id"].startswith("req-")
    assert fields["x-content-type-options"] == "nosniff"
    assert fields["cache-control"] == "no-store"
    assert "server" not in fields
    assert int(fields["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert error["code"]
    return str(error["message"])


async def test_malformed_requests_are_refused() -> None:
    app = App()
    async with edge(app, _settings()) as server:

        async def refused(request: bytes, status: int) -> None:
            async with _peer(server) as peer:
                await peer.send(request)
                answer = await peer.rest()
            assert answer.startswith(b"HTTP/1.1 %d " % status), (request[:200], answer[:200])
            assert _check_refusal(answer, status)

        async with asyncio.TaskGroup() as tasks:
            for request, status in _REFUSED:
                tasks.create_task(refused(request, status))
    assert app.bodies == []
    assert server.connections.count == 0


async def test_what_is_odd_and_harmless() -> None:
    """One answer, whatever follows, and the end."""
    app = App()
    async with edge(app, _settings()) as server:
        for request in _HARMLESS:
            async with _peer(server) as peer:
                await peer.send(request)
                answer = await peer.rest()
            assert answer.startswith(b"HTTP/1.1 200 "), request
            assert answer.count(b"HTTP/1.1 ") == 1, request
    assert app.bodies == [b""] * len(_HARMLESS)


async def test_trailers_are_no_headers() -> None:
    app = App()
    async with edge(app, _settings()) as server, _peer(server) as peer:
        await peer.send(_CHUNKED + b"3\r\nabc\r\n0\r\nX-API-Key: wrn_x\r\nHost: y\r\n\r\n")
        await peer.answer()
        assert app.headers == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]
        assert app.bodies == [b"abc"]
        await peer.send(_GET + b"\r\n")
        assert _status(await peer.answer()) == 200


async def test_who_asks_is_who_is_connected() -> None:
    """What stands in headers is for the application to judge: it knows whom to trust."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["client"][0], scope["scheme"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async with edge(app, _settings()) as server, _peer(server) as peer:
        await peer.send(_GET + b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n\r\n")
        await peer.answer()
    assert seen == [("127.0.0.1", "http")]


async def test_many_requests_on_one_connection() -> None:
    app = App()
    async with edge(app, _settings()) as server, _peer(server) as peer:
        for _ in range(3):
            body = b"x" * 300_000
            await peer.send(_POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert _status(await peer.answer()) == 200
        await peer.send((_GET + b"\r\n") * 5)
        for _ in range(5):
            assert _status(await peer.answer()) == 200
        assert len(app.bodies) == 8


async def test_a_long_pipeline() -> None:
    app = App()
    async with edge(app, _settings()) as server, _peer(server) as peer:
        hold = b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n"
        await peer.send(hold * (PIPELINE_LIMIT + 10))
        assert await peer.rest() == b""
    assert len(app.bodies) <= 1


async def test_an_error_behind_a_request_does_not_answer_it() -> None:
    app = App()
    async with edge(app, _settings()) as server, _peer(server) as peer:
        await peer.send(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.begun.wait()
        await peer.send(b"nonsense\r\n\r\n")
        assert await peer.rest() == b""
        app.gate.set()
        await app.ended.wait()


@pytest.mark.parametrize("step", [1, 7, 10_000])
async def test_another_protocol_that_is_offered_is_not_taken(step: int) -> None:
    """Some clients offer HTTP/2 with each request to a server that they do not know."""
    app = App()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    requests = (
        (_GET + offer + b"\r\n", b""),
        (_POST + offer + b"Content-Length: 0\r\n\r\n", b""),
        (_POST + offer + b"Content-Length: 3\r\n\r\nabc", b"abc"),
        (
            _POST + offer + b"Transfer-Encoding: chunked\r\n\r\n2\r\nde\r\n1\r\nf\r\n0\r\n\r\n",
            b"def",
        ),
        (_GET + b"\r\n", b""),
        (_POST + offer + b"Connection: close\r\nContent-Length: 1\r\n\r\ng", b"g"),
    )
    async with edge(app, _settings()) as server, _peer(server) as peer:
        data = b"".join(request for request, _ in requests)
        for start in range(0, len(data), step):
            await peer.send(data[start : start + step])
            await asyncio.sleep(0)
        for _ in requests[:-1]:
            assert _status(await peer.answer()) == 200
        assert _status(await peer.rest()) == 200
    assert app.bodies == [body for _, body in requests]


async def test_a_body_behind_an_offer_has_its_limits() -> None:
    app = App()
    head = _POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with edge(app, _settings(body_timeout_sec=0.5)) as server:
        for rest, status in ((b"xyz\r\n", 400), (b"3;" + bytes(100_000), 400), (b"3\r\na", 408)):
            async with _peer(server) as peer:
                await peer.send(head + rest)
                _check_refusal(await peer.rest(), status)
    assert app.bodies == []


async def test_an_upgrade_behind_a_request() -> None:
    app = App()
    async with edge(app, _settings()) as server, _peer(server) as peer:
        await peer.send(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.begun.wait()
        await peer.send(_UPGRADE + _KEY + b"\r\n")
        assert await peer.rest() == b""
        app.gate.set()


async def test_heads_that_take_too_long() -> None:
    """Slow bytes are no help: the time is that of the whole head."""
    app = App()
    async with edge(app, _settings(head_timeout_sec=0.5)) as server:

        async def waits(data: bytes, *, first: bytes = b"", drip: bytes = b"") -> bytes:
            async with _peer(server) as peer:
                if first:
                    await peer.send(first)
                    await peer.answer()
                await peer.send(data)
                dripping = asyncio.create_task(_drip(peer, drip, 0.02))
                answer = await peer.rest()
                await dripping
            return answer

        request = _GET + b"\r\n"
        answers = await asyncio.gather(
            waits(b""),
            waits(b"\r\n"),
            waits(b"\r\n", first=request),
            waits(_GET),
            waits(_GET, first=request),
            waits(b"", drip=_GET + b"X: " + b"a" * 10),
        )
    assert list(answers[:3]) == [b""] * 3
    for answer in answers[3:]:
        _check_refusal(answer, 408)
    assert app.bodies == [b""] * 2
    assert server.connections.count == 0


async def _drip(peer: Peer, data: bytes, seconds: float = 0.05) -> None:
    for byte in data:
        await peer.send(bytes([byte]))
        await asyncio.sleep(seconds)


async def test_a_body_that_does_not_get_on() -> None:
    """A byte now and then is not enough; whoever reads the body learns that the client is gone."""
    app = App()
    async with edge(app, _settings(body_timeout_sec=0.5)) as server:
        for data in (b"", b"a" * 100):
            app.ended.clear()
            async with _peer(server) as peer:
                await peer.send(_POST + b"Content-Length: 1000\r\n\r\n")
                dripping = asyncio.create_task(_drip(peer, data))
                _check_refusal(await peer.rest(), 408)
                await app.ended.wait()
                assert dripping.cancel() is bool(data)
    assert app.bodies == []


async def test_a_slow_body_that_gets_on() -> None:
    app = App()
    async with edge(app, _settings(body_timeout_sec=0.6)) as server, _peer(server) as peer:
        await peer.send(_POST + b"Content-Length: 20480\r\n\r\n")
        for _ in range(20):
            await asyncio.sleep(0.075)
            await peer.send(b"a" * 1024)
        assert _status(await peer.answer()) == 200


async def test_a_body_that_waits_for_the_server() -> None:
    """The server is behind with reading: that is not the client's fault."""
    app = App()
    async with edge(app, _settings(body_timeout_sec=0.3)) as server, _peer(server) as peer:
        body = bytes(4 * 1024 * 1024)
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        head = b"POST /hold HTTP/1.1\r\nHost: x\r\n" + length
        sending = asyncio.create_task(peer.send(head + body))
        await app.begun.wait()
        await asyncio.sleep(0.8)
        app.gate.set()
        assert _status(await peer.answer()) == 200
        await sending


async def test_a_body_that_nobody_has_asked_for_yet() -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        assert (await receive())["body"] == b"abc"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async with edge(app, _settings(body_timeout_sec=0.3)) as server, _peer(server) as peer:
        await peer.send(_POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        await asyncio.sleep(0.8)
        gate.set()
        assert _status(await peer.reader.readuntil(b"\r\n\r\n")) == 100
        await peer.send(b"abc")
        assert _status(await peer.answer()) == 200


@pytest.mark.parametrize("field", [b"", b"E2b-Sandbox-Id: nobody\r\n"])
async def test_a_body_for_which_nobody_waits_any_more(field: bytes) -> None:
    """A byte behind the answer keeps no connection, of the API or of a port."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    short = _settings(body_timeout_sec=0.5, keep_alive_sec=0.5)
    async with edge(app, short) as server, _peer(server) as peer:
        await peer.send(_POST + field + b"Content-Length: 1000\r\n\r\n")
        await peer.answer()
        await peer.send(b"a")
        assert await peer.rest() == b""


async def test_a_long_answer_takes_its_time() -> None:
    app = App()
    short = _settings(head_timeout_sec=0.3, body_timeout_sec=0.3, write_timeout_sec=0.3)
    async with edge(app, short) as server, _peer(server) as peer:
        await peer.send(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.begun.wait()
        await peer.send(b"\r\n")
        await asyncio.sleep(0.8)
        app.gate.set()
        assert _status(await peer.answer()) == 200


async def test_an_answer_that_nobody_reads() -> None:
    app = App()
    async with edge(app, _settings(write_timeout_sec=0.5)) as server, _peer(server) as peer:
        peer.pause()
        await peer.send(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.ended.wait()
        await eventually(lambda: server.connections.count == 0)


async def test_an_answer_that_is_read_slowly() -> None:
    """The system tells of room for more only when a third of what it keeps has been read."""
    app, loop = App(), asyncio.get_running_loop()
    async with edge(app, _settings(write_timeout_sec=0.5)) as server:
        with socket.socket() as reader:
            reader.setblocking(False)
            await loop.sock_connect(reader, ("127.0.0.1", server.port))
            await loop.sock_sendall(reader, b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            deadline = loop.time() + 1.8
            while loop.time() < deadline:
                assert await loop.sock_recv(reader, 40_000)
                await asyncio.sleep(0.05)
            assert not app.ended.is_set()
        await app.ended.wait()


async def test_a_connection_that_is_not_used_any_more() -> None:
    async with edge(App(), _settings(keep_alive_sec=0.2)) as server, _peer(server) as peer:
        await peer.send(_GET + b"\r\n")
        await peer.answer()
        assert await peer.rest() == b""


async def test_too_many_connections() -> None:
    limits = _settings(max_connections=3, max_connections_per_address=2)
    async with edge(App(), limits) as server:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(_peer(server))
            async with _peer(server) as peer:
                _check_refusal(await peer.rest(), 429)
            await stack.enter_async_context(_from("127.0.0.2", server))
            async with _from("127.0.0.3", server) as peer:
                _check_refusal(await peer.rest(), 503)
        await eventually(lambda: server.connections.count == 0)
        async with _peer(server) as peer:
            await peer.send(_GET + b"\r\n")
            assert _status(await peer.answer()) == 200


@asynccontextmanager
async def _from(address: str, server: HttpServer) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, local_addr=(address, 0)
    )
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


async def test_a_trusted_proxy_has_connections_for_many() -> None:
    limits = _settings(max_connections_per_address=1, trusted_proxies="127.0.0.2")
    async with edge(App(), limits) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            peer = await stack.enter_async_context(_from("127.0.0.2", server))
            await peer.send(_GET + b"\r\n")
            assert _status(await peer.answer()) == 200


async def test_a_websocket_keeps_its_place() -> None:
    app = App()
    async with edge(app, _settings(max_connections_per_address=1)) as server:
        async with _peer(server) as peer:
            await peer.send(_UPGRADE + _KEY + b"\r\n")
            assert _status(await peer.reader.readuntil(b"\r\n\r\n")) == 101
            async with _peer(server) as second:
                _check_refusal(await second.rest(), 429)
        await eventually(lambda: server.connections.count == 0)


def _frame(opcode: int, payload: bytes, *, last: bool = True) -> bytes:
    assert len(payload) < 126
    return bytes([(0x80 if last else 0) | opcode, 0x80 | len(payload)]) + bytes(4) + payload


async def test_a_message_in_very_many_fragments() -> None:
    app = App()
    async with edge(app, _settings()) as server, _peer(server) as peer:
        await peer.send(_UPGRADE + _KEY + b"\r\n")
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(_frame(1, b"a", last=False))
        await peer.send((_frame(0, b"", last=False) + _frame(0, b"b", last=False)) * 5000)
        await peer.send(_frame(0, b"c"))
        await eventually(lambda: app.bodies == [b"a" + b"b" * 5000 + b"c"])


async def test_small_messages_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes with one read takes a second and more to parse."""
    monkeypatch.setattr(turns, "_TURN_SECONDS", 0.0)
    app = App()
    most = 0
    async with edge(app, _settings()) as server, _peer(server) as peer:
        await peer.send(_UPGRADE + _KEY + b"\r\n")
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(_frame(1, b"a") * 20_000)
        async with asyncio.timeout(20):
            while len(app.bodies) < 20_000:
                before = len(app.bodies)
                await asyncio.sleep(0)
                most = max(most, len(app.bodies) - before)
    assert app.bodies == [b"a"] * 20_000
    assert most < 300


async def test_small_chunks_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_TURN_SECONDS", 0.0)
    chunks = 0

    class Counting(http_protocol.HttpProtocol):
        def on_body(self, body: bytes) -> None:
            nonlocal chunks
            chunks += 1
            super().on_body(body)

    monkeypatch.setattr(http_server, "HttpProtocol", Counting)
    app, most = App(), 0
    async with edge(app, _settings()) as server, _peer(server) as peer:
        await peer.send(_CHUNKED + b"1\r\na\r\n" * 40_000 + b"0\r\n\r\n" + _GET + b"\r\n")
        async with asyncio.timeout(20):
            while chunks < 40_000:
                before = chunks
                await asyncio.sleep(0)
                most = max(most, chunks - before)
        assert _status(await peer.answer()) == _status(await peer.answer()) == 200
    assert app.bodies == [b"a" * 40_000, b""]
    assert most < 3000


@pytest.mark.parametrize("opcode", [9, 10])
async def test_a_flood_of_pings_ends_the_connection(opcode: int) -> None:
    async with edge(App(), _settings()) as server, _peer(server) as peer:
        await peer.send(_UPGRADE + _KEY + b"\r\n")
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(_frame(opcode, b"") * 50_000)
        rest = await peer.rest()
    assert len(rest) < 10_000
    assert rest.partition(b"\x88")[2][1:3] == (1008).to_bytes(2, "big")


async def test_pings_of_a_client_that_reads_no_pongs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pongs that wait for it are bounded."""
    monkeypatch.setattr(websocket_protocol, "_CONTROL_BURST", 1_000_000)
    async with edge(App(), _settings()) as server, _peer(server) as peer:
        await peer.send(_UPGRADE + _KEY + b"\r\n")
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.pause()
        (connection,) = server.server_state.connections
        for _ in range(200):
            await peer.send(_frame(9, b"a" * 125) * 500)
        waiting = connection.transport.get_write_buffer_size()
        assert waiting < 1024 * 1024


async def test_a_server_that_is_told_to_stop_does_not_wait_for_its_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "_CHECK_SECONDS", 3600)
    async with asyncio.timeout(30), listening(App()) as port:
        assert port
