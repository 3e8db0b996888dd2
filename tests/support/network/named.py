"""Hosts with names in the played internet, and a guest that calls them."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from support.certificates import Pair
from support.network.played_guest import listening_tcp
from support.network.world import World
from wrenn_sandbox.patience import patience


@dataclass
class Hosts:
    """`addresses` of names, which may change. Servers say their address and what they were sent."""

    world: World
    addresses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Heads of HTTP requests that have arrived, and a word for each connection by TLS."""
    connected: int = 0

    async def open(self, address: str, port: int) -> "Call":
        """A connection of the guest's to an address."""
        return await Call.open(self.world, address, port)

    async def get(self, host: str, *, address: str | None = None) -> "Answer":
        """What the guest is answered who asks an address for a host by HTTP."""
        async with await self.open(address or self.world.outside.address, 80) as call:
            return await call.request(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")

    async def secure(self, name: str, authority: str, *, address: str | None = None) -> "Call":
        """The same by TLS to a host whose certificate this authority (PEM) vouches for."""
        context = ssl.create_default_context(cadata=authority)
        call = await self.open(address or self.world.outside.address, 443)
        try:
            async with asyncio.timeout(patience(20)):
                await call.writer.start_tls(context, server_hostname=name)
        except BaseException:
            await _closed(call.writer)
            raise
        return call

    async def tls(self, name: str | None, *, address: str | None = None) -> bytes:
        """What the server says to a guest who names it in TLS; raises OSError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        async with (
            await self.open(address or self.world.outside.address, 443) as call,
            asyncio.timeout(patience(20)),
        ):
            await call.writer.start_tls(context, server_hostname=name)
            return await call.reader.readline()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: str


@dataclass(frozen=True)
class Call:
    """A connection of the guest's."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, world: World, address: str, port: int) -> "Call":
        """Raises OSError; `TimeoutError` where nobody says anything."""
        sock = await world.namespaces.run(world.guest.netns, socket.socket)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(patience(5)):
                await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except BaseException:
            sock.close()
            raise
        return cls(*await asyncio.open_connection(sock=sock))

    async def __aenter__(self) -> "Call":
        return self

    async def __aexit__(self, *_: object) -> None:
        await _closed(self.writer)

    async def request(self, text: str) -> Answer:
        """Send this and read one answer; raises OSError and `EOFError`."""
        self.writer.write(text.encode("latin-1"))
        async with asyncio.timeout(patience(20)):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            pairs = (line.partition(":") for line in lines)
            headers = {key.lower(): value.strip() for key, _, value in pairs}
            size = int(headers.get("content-length", 0))
            body = (await self.reader.readexactly(size)).decode("latin-1")
        return Answer(int(first.split()[1]), headers, body)

    async def ended(self) -> bytes:
        """What still comes before the end of the connection."""
        async with asyncio.timeout(patience(10)):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


_DNS_BYTES: Final = 1232
"""Of an answer by UDP, at most."""
_DNS_BYTES_AT_LENGTH: Final = 65535

Serve = Callable[[Hosts, str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def hosts(
    world: World, certificate: Pair, *, over_tls: "Serve | None" = None
) -> AsyncIterator[Hosts]:
    """A resolver, and servers for HTTP and TLS at all addresses of the played internet."""
    outside, found = world.outside, Hosts(world)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    loop = asyncio.get_running_loop()

    def reply_to(data: bytes) -> dns.message.Message:
        query = dns.message.from_wire(data)
        reply = dns.message.make_response(query)
        name = query.question[0].name
        addresses = found.addresses.get(name.to_text(omit_final_dot=True), ())
        if addresses:
            reply.answer.append(dns.rrset.from_text(name, 0, "IN", "A", *addresses))
        else:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply

    def answer(resolver: socket.socket) -> None:
        data, asker = resolver.recvfrom(4096)
        reply = reply_to(data)
        if len(reply.to_wire(max_size=_DNS_BYTES_AT_LENGTH)) > _DNS_BYTES:
            reply.answer.clear()
            reply.flags |= dns.flags.TC
        resolver.sendto(reply.to_wire(), asker)

    async def answer_at_length(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2))
        reply = reply_to(await reader.readexactly(size))
        writer.write(reply.to_wire(max_size=_DNS_BYTES_AT_LENGTH, prepend_length=True))
        await _closed(writer)

    async with AsyncExitStack() as stack:
        resolver = stack.enter_context(await world.server(outside.private_address, 53))
        loop.add_reader(resolver, answer, resolver)
        stack.callback(loop.remove_reader, resolver)
        listener = await world.listener(outside.private_address, 53)
        at_length = await asyncio.start_server(answer_at_length, sock=listener)
        stack.push_async_callback(at_length.wait_closed)
        stack.callback(at_length.close)
        for address in (outside.address, outside.second_address, outside.private_address):
            for port, serve in ((80, serve_http), (443, over_tls or _tls)):
                make = partial(listening_tcp, address, port)
                listener = await world.namespaces.run(outside.netns, make)
                server = await asyncio.start_server(
                    partial(serve, found, address),
                    sock=listener,
                    ssl=context if port == 443 else None,
                )
                stack.push_async_callback(server.wait_closed)
                stack.callback(server.close)
        yield found


async def serve_http(
    found: Hosts, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One that answers requests, says what it is sent, and upgrades to an echo."""
    found.connected += 1
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            found.asked.append(head)
            if "\r\nupgrade:" in head.lower():
                writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n")
                writer.write(b"Connection: Upgrade\r\n\r\n")
                while data := await reader.read(1000):
                    writer.write(data.upper())
                break
            length = [line for line in head.split("\r\n") if line.lower().startswith("content-l")]
            body = await reader.readexactly(int(length[0].split(":")[1]) if length else 0)
            text = address.encode() + b" " + body
            first = (
                b"302 Found\r\nLocation: https://other.example/" if " /away " in head else b"200 OK"
            )
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (first, len(text)) + text)
            await writer.drain()
    except (EOFError, ConnectionError):
        pass
    finally:
        await _closed(writer)


async def _tls(
    found: Hosts, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    found.connected += 1
    found.asked.append("tls")
    writer.write(f"{address}\n".encode())
    try:
        await reader.read()
    except OSError:
        pass
    finally:
        await _closed(writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
