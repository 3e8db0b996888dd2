"""One request and its answer."""

from __future__ import annotations

import json
import time

from .body import Body
from .connection import Connection
from .errors import AgentError
from .http import Head, format_head

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

Headers = tuple[tuple[str, str], ...]

_LINGER_BYTES = 8 * 1024 * 1024
_LINGER_SECONDS = 5.0


class Exchange:
    """What a route gets: the request's head and body, and ways to answer."""

    def __init__(self, connection: Connection, head: Head) -> None:
        self.connection = connection
        self.head = head
        self.body = Body(connection, head)
        self.answered = False
        """The head of an answer is on its way."""
        self._reuse = head.keep_alive

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the request, names in lower case."""
        return self.head.headers

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on the same connection."""
        return self._reuse and not self.connection.torn

    async def reply(self, status: int, content: bytes = b"", headers: Headers = ()) -> None:
        """Send a whole answer; `content` is JSON unless `headers` name another type."""
        if not headers and content:
            headers = (("Content-Type", "application/json"),)
        await self.send_head(status, headers, len(content), content)

    async def reply_error(self, error: AgentError) -> None:
        """Send `error` as `{"code","message"}`; the code is a word for RPC, else the status."""
        code = error.code if self.head.is_rpc else error.status
        content = json.dumps({"code": code, "message": error.message}).encode()
        await self.reply(error.status, content)

    async def send_head(
        self, status: int, headers: Headers, length: int | None, first: bytes = b""
    ) -> None:
        """Start an answer of `length` bytes (None: chunked), `first` being its beginning."""
        self.answered = True
        if length is not None:
            self.settle_body()
            if status != 204:
                headers += (("Content-Length", str(length)),)
        elif self.head.version == "HTTP/1.1":
            headers += (("Transfer-Encoding", "chunked"),)
        else:
            self._reuse = False
        if not self._reuse:
            headers += (("Connection", "close"),)
        await self.connection.send(
            format_head(status, headers) + (b"" if self.head.method == "HEAD" else first)
        )

    async def switch(self, protocol: str) -> None:
        """Answer that from here on the connection speaks another protocol."""
        self.answered = True
        self._reuse = False
        await self.connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\n"
            b"Connection: Upgrade\r\nUpgrade: %b\r\n\r\n" % protocol.encode()
        )

    async def send_chunk(self, data: bytes) -> None:
        """Send a part of an answer without a length; an empty one ends it."""
        if self.head.version == "HTTP/1.1":
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self.connection.send(data)

    def settle_body(self) -> None:
        """Skip what is left of the body if it has arrived; else the connection is at its end."""
        if not self.body.finished and not self.body.skip_buffered():
            self._reuse = False

    async def linger(self) -> None:
        """Read and drop what the client still sends, so that it gets to see the answer."""
        self.connection.finish_sending()
        budget = _LINGER_BYTES
        deadline = time.monotonic() + _LINGER_SECONDS
        while budget > 0 and await self.connection.receive(deadline - time.monotonic()):
            budget -= len(self.connection.buffer)
            self.connection.buffer.clear()
