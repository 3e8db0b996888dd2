"""A hostile guest: an HTTP server on a real port, in threads of its own, that follows a script.

Scripts are made by hand or by `Liar`, which knows what an agent would say and says it wrong. The
same seed gives the same lies.
"""

import asyncio
import base64
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import pytest

from wrenn_sandbox.host import agent as agent_module
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.slot import Slot

Play = Callable[[socket.socket], None]
"""What is done with a connection on which a request has come in."""

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n"
CHUNKED = STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_LONGEST = 300_000
"""Bytes of a body made at random; floods are for more."""
RESET = struct.pack("ii", 1, 0)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def frame(message: object, flags: int = 0) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">BI", flags, len(body)) + body


def event(**kind: object) -> bytes:
    """A chunk with one event of a process."""
    return chunk(frame({"event": kind}))


def answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


END = chunk(frame({}, 2)) + b"0\r\n\r\n"


@dataclass(frozen=True)
class Script:
    """What is sent: pieces with a pause in seconds before each, and what comes then."""

    pieces: list[tuple[float, bytes]]
    ending: str = "close"
    """close, reset, wait (for the other side to go) or flood (with the last piece)."""
    reads: bool = True
    """Wait for a request first."""

    def play(self, connection: socket.socket) -> None:
        if self.reads and not connection.recv(65536):
            return
        for pause, data in self.pieces:
            if pause:
                time.sleep(pause)
            connection.sendall(data)
        match self.ending:
            case "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            case "wait":
                while connection.recv(65536):
                    pass
            case "flood":
                while True:
                    connection.sendall(self.pieces[-1][1] or b"x")


def says(*parts: bytes, ending: str = "close") -> Script:
    return Script([(0, part) for part in parts], ending)


@dataclass
class HostileGuest:
    """`script` is played on each connection. Use as a context."""

    script: Script = field(default_factory=lambda: says(b""))
    connections: int = 0

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(20)
        self.hang_up()

    @property
    def address(self) -> tuple[str, int]:
        name: tuple[str, int] = self._listener.getsockname()
        return name

    def hang_up(self) -> None:
        """Cut every connection and wait for the threads behind them."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._threads.clear()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection, self.script))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, script: Script) -> None:
        try:
            with connection, suppress(OSError):
                script.play(connection)
        finally:
            self._open.discard(connection)


_METRICS = ["cpu_count", "cpu_used_pct", "mem_total", "mem_used", "disk_used", "disk_total"]


class Liar:
    """Makes scripts at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def script(self) -> Script:
        """An answer with something wrong, or several of them."""
        choose = self._random
        data = b"".join(self._answer() for _ in range(choose.choice((1, 1, 1, 1, 2, 3))))
        if choose.random() < 0.35:
            data = self._mutated(data)
        ending = choose.choice(("close", "close", "close", "reset", "wait", "wait", "flood"))
        return Script(self._pieces(data), ending, reads=choose.random() < 0.93)

    def _pieces(self, data: bytes) -> list[tuple[float, bytes]]:
        choose = self._random
        if choose.random() < 0.5 or not data:
            return [(0, data)]
        size = choose.choice((1, 7, 100, 4096))
        parts = [data[at : at + size] for at in range(0, min(len(data), 400 * size), size)]
        parts.append(data[400 * size :])
        pause = choose.choice((0, 0, 0, 0.001)) if len(parts) < 50 else 0
        return [(pause, part) for part in parts if part] or [(0, b"")]

    def _mutated(self, data: bytes) -> bytes:
        choose = self._random
        garbled = bytearray(data)
        for _ in range(choose.randint(1, 5)):
            if not garbled:
                break
            at = choose.randrange(len(garbled))
            match choose.randrange(5):
                case 0:
                    garbled[at] = choose.randrange(256)
                case 1:
                    del garbled[at : at + choose.randint(1, 40)]
                case 2:
                    garbled[at:at] = garbled[at : at + choose.randint(1, 200)]
                case 3:
                    del garbled[at:]
                case 4:
                    garbled[at:at] = choose.choice((b"\0", b"\r\n", b"\xff", b"{", b"[" * 3000))
        return bytes(garbled)

    def _answer(self) -> bytes:
        choose = self._random
        body = choose.choice((self._stream, self._stream, self._unary, self._raw))()
        return self._framed(body)

    def _framed(self, body: bytes) -> bytes:
        choose = self._random
        status = choose.choice(
            (b"200 OK",) * 12
            + (b"204 x", b"100 Continue", b"101 Switching", b"304 x", b"400 x", b"404 x", b"507 x")
            + (b"500 x", b"999 x", b"20 x", b"2000 x", b"200", b"-1 x", b"200 " + b"x" * 70_000)
        )
        head = choose.choice((b"HTTP/1.1 ",) * 12 + (b"HTTP/1.0 ", b"HTTP/2.0 ", b"", b"ICE/1.1 "))
        head += status + b"\r\n"
        for _ in range(choose.choice((0, 0, 1, 3, 120))):
            head += choose.choice(
                (
                    b"X: y\r\n",
                    b"Connection: close\r\n",
                    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
                    b"Content-Encoding: gzip\r\n",
                    b"X-Long: " + b"x" * 5000 + b"\r\n",
                    b": empty\r\n",
                    b" folded\r\n",
                    b"No colon\r\n",
                    b"Set-Cookie: \xff\xfe\r\n",
                )
            )
        if choose.random() < 0.5:
            length = choose.choice((len(body),) * 6 + (0, 1, len(body) * 2, 2**62, 2**64, -1))
            text = choose.choice((b"%d",) * 8 + (b"+%d", b"0x%x", b"%d ", b"%d,%d"))
            line = b"Content-Length: " + text % ((length,) * text.count(b"%")) + b"\r\n"
            return head + line * choose.choice((1, 1, 1, 1, 2)) + b"\r\n" + body
        head += (
            b"Transfer-Encoding: " + choose.choice((b"chunked",) * 8 + (b"gzip", b"x")) + b"\r\n"
        )
        if choose.random() < 0.05:
            head += b"Content-Length: 5\r\n"
        return head + b"\r\n" + self._chunks(body)

    def _chunks(self, body: bytes) -> bytes:
        choose = self._random
        size = choose.choice((1 if len(body) < 20_000 else 29, 997, 65536, 1 << 20))
        made = bytearray()
        for at in range(0, len(body), size):
            part = body[at : at + size]
            if choose.random() < 0.02:
                lie = choose.choice((len(part) + 1, 2**31, 2**63, 2**70))
                made += b"%x\r\n%b\r\n" % (lie, part)
            else:
                made += chunk(part)
        end = choose.choice((b"0\r\n\r\n",) * 8 + (b"", b"0\r\n", b"0\r\nT: x\r\n\r\n", b"zz\r\n"))
        return bytes(made + end)

    def _raw(self) -> bytes:
        return self._random.randbytes(self._random.choice((0, 1, 100, 70_000)))

    def _stream(self) -> bytes:
        choose = self._random
        made = bytearray()
        for _ in range(choose.choice((0, 1, 2, 3, 5, 20, 1000))):
            if len(made) < _LONGEST:
                made += self._envelope(self._event())
        if choose.random() < 0.8:
            last = choose.choice(
                (b"{}", b"{}", b"", b'{"error": {}}', b"[]", self._json({"error": self._error()}))
            )
            made += frame(last, 2)
        return bytes(made)

    def _envelope(self, message: bytes) -> bytes:
        choose = self._random
        flags = choose.choice((0,) * 40 + (1, 2, 3, 0x80, 255))
        length = len(message) if choose.random() < 0.98 else choose.choice((0, 2**20, 2**32 - 1))
        return struct.pack(">BI", flags, length) + message

    def _event(self) -> bytes:
        choose = self._random
        kind = choose.choice(("start", "data", "data", "data", "end", "keepalive", "odd"))
        match kind:
            case "start":
                made: object = {"start": {"pid": self._number(7)}}
            case "data":
                channel = choose.choice(("stdout", "stderr", "pty"))
                made = {"data": {channel: self._bytes()}}
            case "end":
                made = {
                    "end": {
                        "exitCode": self._number(0),
                        "exited": True,
                        "status": self._text(),
                        "durationMs": self._number(1),
                    }
                }
            case "keepalive":
                made = {"keepalive": {}}
            case _:
                made = self._odd()
        return self._json({"event": made} if choose.random() < 0.97 else made)

    def _unary(self) -> bytes:
        choose = self._random
        count = choose.choice((0, 1, 2, 50))
        match choose.randrange(6):
            case 0:
                made: object = {"entries": [self._entry() for _ in range(count)]}
            case 1:
                made = {"entry": self._entry()}
            case 2:
                made = {"processes": [self._process() for _ in range(count)]}
            case 3:
                made = {name: self._number(5) for name in _METRICS if choose.random() < 0.97}
            case 4:
                made = self._error()
            case _:
                made = self._odd()
        return self._json(made)

    def _entry(self) -> object:
        choose = self._random
        name = choose.choice(
            ("a", "a", "a", "..", ".", "", "a/b", "\0", "/", "a\u202eb", "x" * 300)
        )
        made: dict[str, object] = {
            "name": name,
            "path": choose.choice((f"/root/{name}", f"/../{name}", name, "/etc/shadow")),
            "type": choose.choice(("FILE_TYPE_FILE", "FILE_TYPE_DIRECTORY", "", "x")),
            "size": choose.choice(("5", "5", "5", "-1", "9" * 30, "", "x", 5)),
            "mode": self._number(420),
            "permissions": self._text(),
            "owner": self._text(),
            "group": self._text(),
            "modifiedTime": choose.choice(
                ("2026-01-01T00:00:00Z",) * 5
                + ("2026-01-01T00:00:00", "0001-01-01T00:00:00+23:59", "99999-01-01T00:00:00Z", "")
            ),
        }
        if choose.random() < 0.2:
            made["symlinkTarget"] = self._text()
        if choose.random() < 0.1:
            made["rawPath"] = self._text()
        return made

    def _process(self) -> object:
        config = {"cmd": self._text(), "args": [self._text() for _ in range(3)]}
        return {"config": config, "pid": self._number(9), "tag": self._text()}

    def _error(self) -> object:
        code = self._random.choice(
            ["not_found", "invalid_argument", "permission_denied", "already_exists", "x" * 5000]
        )
        return {"code": code, "message": self._text()}

    def _number(self, usual: int) -> object:
        return self._random.choice(
            (usual,) * 10
            + (-1, 0, 2**31, 2**63, 2**64, -(2**63), 10**30, 1.5, 1e308, "7", None, [], True, 256)
        )

    def _bytes(self) -> object:
        choose = self._random
        data = choose.randbytes(choose.choice((0, 3, 100, 65536)))
        usual = base64.b64encode(data).decode()
        return choose.choice((usual,) * 12 + ("!", "QQ", "QUJD" * 3 + "=", 5, None, usual + "="))

    def _text(self) -> str:
        return self._random.choice(
            ("word",) * 6
            + ("", "\0", "\x1b[2J\x1b]0;x\x07", "\u202e", "x" * 5000, "é" * 3000, "a\r\nb: c")
            + ('Traceback (most recent call last):\n  File "/etc/x"', "</script>", "\U0001f600")
        )

    def _odd(self) -> object:
        return self._random.choice(
            ([], 5, None, "x", {"start": 5}, {"data": []}, {"end": None}, {"x": {"y": [1]}}, {})
        )

    def _json(self, value: object) -> bytes:
        text = json.dumps(value)
        if self._random.random() < 0.03:
            odd = ('"\\ud800"', '"\\udc00\\ud800"', "NaN", "1e999", "[" * 5000, "Infinity", "-")
            text = text.replace('"word"', self._random.choice(odd), 1)
        return text.encode()


def diverted(monkeypatch: pytest.MonkeyPatch, guest: HostileGuest) -> set[int]:
    """The ports of the guests that are the hostile one from when they are put in here."""
    ports: set[int] = set()

    async def connect(namespaces: NamespaceThread, slot: Slot, *args: object) -> socket.socket:
        if slot.host_port not in ports:
            return await connect_guest(namespaces, slot)
        sock = socket.socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, guest.address)
        except BaseException:
            sock.close()
            raise
        return sock

    monkeypatch.setattr(agent_module, "connect_guest", connect)
    return ports
