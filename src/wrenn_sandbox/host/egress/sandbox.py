"""What the proxy has of one sandbox: its listeners, its names, and its connections."""

import asyncio
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Final

import dns.exception
import dns.message
import dns.name
import dns.rcode

from . import http, tls
from .connection import Connection, Denied, Unreachable
from .names import covers

CONNECTIONS: Final = 64
"""Of one sandbox at once; others wait."""
LAST: Final = 10
"""How many of the names that were refused are told."""
_ANSWER_SEC: Final = 3.0
_DIAL_SEC: Final = 10.0
_ADDRESSES: Final = 3
"""How many of a name's are tried."""
_RETRY_SEC: Final = 0.1
_DNS_PORT: Final = 53
_DNS_BYTES: Final = 1232

Open = Callable[[str], Awaitable[socket.socket]]
"""A new socket in the sandbox's slot, `tcp` or `udp`; raises OSError."""
_SERVE: Final = {http.PORT: http.serve, tls.PORT: tls.serve}


class Sandbox:
    """`listeners` takes what the slot redirects of each port. `denials` counts refusals."""

    def __init__(self, listeners: dict[int, socket.socket], open_socket: Open) -> None:
        self._listeners = listeners
        self._open = open_socket
        self._names: frozenset[str] = frozenset()
        self._resolvers: Sequence[str] = ()
        self._closed: Sequence[IPv4Network] = ()
        self._allowed: Sequence[IPv4Network] = ()
        self._room = asyncio.Semaphore(CONNECTIONS)
        self._serving: dict[Connection, asyncio.Task[None]] = {}
        self.denials = 0
        self.last_denied: deque[str] = deque(maxlen=LAST)
        self._listening = [
            asyncio.create_task(self._listen(listener, port))
            for port, listener in listeners.items()
        ]

    def change(
        self,
        names: Sequence[str],
        resolvers: Sequence[str],
        closed: Sequence[str],
        allowed: Sequence[str],
    ) -> None:
        """Another policy. Names never lead to what is `closed` and not `allowed`."""
        self._names = frozenset(names)
        self._resolvers = resolvers
        self._closed = tuple(map(IPv4Network, closed))
        self._allowed = tuple(map(IPv4Network, allowed))
        for connection, task in self._serving.items():
            if connection.name is not None and not self._holds(connection):
                task.cancel()

    def close(self) -> None:
        for task in (*self._listening, *self._serving.values()):
            task.cancel()
        for listener in self._listeners.values():
            listener.close()

    def _holds(self, connection: Connection) -> bool:
        allowed = connection.name is not None and covers(self._names, connection.name)
        return allowed and (connection.address is None or self._is_open(connection.address))

    def _is_open(self, address: str) -> bool:
        number = IPv4Address(address)
        return any(number in each for each in self._allowed) or not any(
            number in each for each in self._closed
        )

    async def _listen(self, listener: socket.socket, port: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                near, _ = await loop.sock_accept(listener)
            except (OSError, MemoryError):  # such as no descriptor left
                self._room.release()
                await asyncio.sleep(_RETRY_SEC)
                continue
            connection = Connection(near, self._dial)
            task = asyncio.create_task(self._serve(connection, port))
            self._serving[connection] = task
            task.add_done_callback(partial(self._end, connection))

    async def _serve(self, connection: Connection, port: int) -> None:
        try:
            await connection.serve(_SERVE[port])
        except (OSError, TimeoutError):
            return

    def _end(self, connection: Connection, task: "asyncio.Task[None]") -> None:
        del self._serving[connection]
        connection.near.close()  # a task that was cancelled at once has not begun
        self._room.release()
        if not task.cancelled():
            task.exception()

    async def _dial(self, connection: Connection, name: str, port: int) -> socket.socket:
        connection.name, connection.address = name, None
        if not covers(self._names, name):
            raise self._denied(name, f"The network policy of this sandbox does not allow {name}")
        found = await self._addresses(name)
        if not found:
            raise Unreachable(f"No address of {name} was found")
        usable = [each for each in found if self._is_open(each)]
        if not usable:
            raise self._denied(name, f"{name} leads to an address that is closed to sandboxes")
        for address in usable[:_ADDRESSES]:
            connection.address = address
            sock = await self._socket("tcp")
            try:
                async with asyncio.timeout(_DIAL_SEC):
                    await asyncio.get_running_loop().sock_connect(sock, (address, port))
                return sock
            except (OSError, TimeoutError):
                sock.close()
            except BaseException:
                sock.close()
                raise
        raise Unreachable(f"{name} does not answer")

    def _denied(self, name: str, why: str) -> Denied:
        self.denials += 1
        if name in self.last_denied:
            self.last_denied.remove(name)
        self.last_denied.append(name)
        return Denied(why)

    async def _addresses(self, name: str) -> list[str]:
        """The IPv4 addresses of a name in any order; none where it has none or nobody answers."""
        query = dns.message.make_query(dns.name.from_text(name), "A", payload=_DNS_BYTES)
        for resolver in (*self._resolvers, *self._resolvers[:1]):
            try:
                with await self._socket("udp") as sock:
                    async with asyncio.timeout(_ANSWER_SEC):
                        answer = await _asked(sock, resolver, query)
                if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    continue
                found = answer.resolve_chaining().answer
            except (OSError, TimeoutError, dns.exception.DNSException):
                continue
            addresses = [] if found is None else [str(each) for each in found]
            return random.sample(addresses, len(addresses))
        return []

    async def _socket(self, kind: str) -> socket.socket:
        try:
            return await self._open(kind)
        except OSError as error:
            raise Unreachable("This host has no connection left") from error


async def _asked(
    sock: socket.socket, resolver: str, query: dns.message.QueryMessage
) -> dns.message.QueryMessage:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (resolver, _DNS_PORT))
    await loop.sock_sendall(sock, query.to_wire())
    while True:
        data = await loop.sock_recv(sock, 4096)
        try:
            answer = dns.message.from_wire(data, ignore_trailing=True)
        except (dns.exception.DNSException, ValueError):
            continue
        if query.is_response(answer) and isinstance(answer, dns.message.QueryMessage):
            return answer
