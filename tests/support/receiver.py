"""A receiver of webhooks on a port of this machine, which keeps what it got."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from wrenn_sandbox.patience import patience

Json = dict[str, object]
Answer = Callable[["Request"], bytes]


def status(code: int, *headers: str) -> bytes:
    """An answer with this status and no body."""
    lines = (f"HTTP/1.1 {code} X", *headers, "Content-Length: 0", "Connection: close", "", "")
    return "\r\n".join(lines).encode()


@dataclass(frozen=True)
class Request:
    """What was asked: names of headers in lower case."""

    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


@dataclass
class Receiver:
    """Answers 204 unless `answer` says something else; an empty answer hangs up."""

    scheme: str
    port: int = 0
    answer: Answer = lambda _: status(204)
    requests: "asyncio.Queue[Request]" = field(default_factory=asyncio.Queue)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Answers wait for it."""

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hook"

    async def got(self) -> Request:
        async with asyncio.timeout(patience(15)):
            return await self.requests.get()

    async def types(self, number: int) -> list[object]:
        return [(await self.got()).json["type"] for _ in range(number)]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            pairs = (line.partition(": ") for line in head[1:] if line)
            headers = {name.lower(): value for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            request = Request(head[0].split(" ")[1], headers, body)
            await self.requests.put(request)
            await self.gate.wait()
            writer.write(self.answer(request))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def receiver(context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver until the end of the block; with a context it speaks TLS."""
    made = Receiver("http" if context is None else "https")
    made.gate.set()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        made.gate.set()
        server.close()
        await server.wait_closed()
