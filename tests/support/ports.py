"""A server on a port with processes for machines: what listens here listens in every guest."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

import httpx2

from support.api_server import Server, Team, destroy_all, serve_processes
from support.listening import edge
from wrenn_sandbox.edge.address import host_of
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings

Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""What a program does on each connection to its port."""


@dataclass
class Program:
    """A program on a port, and how many connections it has had."""

    port: int
    connections: int = 0
    heads: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def program(play: Play) -> AsyncIterator[Program]:
    """A program that listens on 127.0.0.1 until the end of the block."""
    tasks: set[asyncio.Task[None]] = set()
    running = Program(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        running.connections += 1
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await play(reader, writer)
                writer.close()
                await writer.wait_closed()
        finally:
            writer.transport.abort()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    running.port = server.sockets[0].getsockname()[1]
    try:
        yield running
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


def answering(answer: bytes, heads: list[bytes] | None = None) -> Play:
    """Reads a head, which is added to `heads`, and sends these bytes."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if heads is not None:
            heads.append(head)
        writer.write(answer)
        await writer.drain()

    return play


@dataclass
class Edge:
    """A server with a team, and what speaks to its port."""

    server: Server
    team: Team
    port: int

    @classmethod
    @asynccontextmanager
    async def serving(cls, settings: Settings) -> AsyncIterator[Self]:
        try:
            async with AsyncExitStack() as stack:
                server, _ = await stack.enter_async_context(serve_processes(settings))
                listener = await stack.enter_async_context(edge(server.app, settings))
                yield cls(server, await server.team(), listener.port)
        finally:
            await destroy_all(settings)

    async def create(self, **body: object) -> str:
        answer = await self.team.client.post("/v1/sandboxes", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def act(self, id: str, action: str) -> None:
        answer = await self.team.client.post(f"/v1/sandboxes/{id}/{action}")
        assert answer.status_code == 200, answer.text

    async def ports(self, id: str) -> dict[str, str]:
        answer = await self.team.client.get(f"/v1/sandboxes/{id}/ports")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def host(self, id: str, port: int) -> str:
        return f"{host_of(port, id, 'localhost')}:{self.port}"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Requests to the port of the server, with whatever host they name."""
        async with httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", timeout=patience(20), trust_env=False
        ) as client:
            yield client

    async def get(self, id: str, port: int, path: str = "/", **headers: str) -> httpx2.Response:
        """One request by the name of the host."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client() as client:
            return await client.get(path, headers={"Host": self.host(id, port), **named})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def raw(self, request: bytes) -> bytes:
        """All that is answered to these bytes until the connection ends."""
        reader, writer = await self.connect()
        writer.write(request)
        try:
            async with asyncio.timeout(patience(20)):
                return await reader.read()
        finally:
            writer.transport.abort()
