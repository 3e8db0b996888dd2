"""What the proxy has of one sandbox: its listeners, its names, and its connections."""

import asyncio
import random
import socket
import ssl
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Final, TypedDict

import dns.exception
import dns.flags
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
_SO_ORIGINAL_DST: Final = 80


class Injection(TypedDict):
    """What the rules for secrets need, as the server says it."""

    certificate: str
    key: str
    headers: Sequence[tuple[str, str, str]]


class Sandbox:
    """`listeners` takes what the slot redirects of each port. `denials` counts refusals."""

    def __init__(
        self,
        listeners: dict[int, socket.socket],
        open_socket: Open,
        far_context: ssl.SSLContext,
    ) -> None:
        self.far_context = far_context
        self.rules: tls.Rules | None = None
        self._ruled: frozenset[str] = frozenset()
        self._injection: Injection | None = None
        self._listeners = listeners
        self._open = open_socket
        self._names: frozenset[str] = frozenset()
        self._resolvers: Sequence[str] = ()
        self._closed: Sequence[IPv4Network] = ()
        self._allowed: Sequence[IPv4Network] = ()
        self._denied: Sequence[IPv4Network] = ()
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
        ruled: Sequence[str],
        resolvers: Sequence[str],
        closed: Sequence[str],
        allowed: Sequence[str],
        denied: Sequence[str],
        injection: Injection | None,
    ) -> None:
        """Another policy. Names never lead to what is `closed` and not `allowed`.

        There are rules for secrets of the names `ruled`, which the `injection` says. Without it
        these names lead nowhere.
        """
        self._names = frozenset(names)
        self._ruled = frozenset(ruled)
        self._resolvers = resolvers
        self._closed = tuple(map(IPv4Network, closed))
        self._allowed = tuple(map(IPv4Network, allowed))
        self._denied = tuple(map(IPv4Network, denied))
        if injection != self._injection:
            self._injection = injection
            self.rules = None if injection is None else tls.Rules(**injection)
        for connection, task in self._serving.items():
            if not self._holds(connection):
                task.cancel()

    def close(self) -> None:
        for task in (*self._listening, *self._serving.values()):
            task.cancel()
        for listener in self._listeners.values():
            listener.close()

    def has_rule(self, name: str) -> bool:
        """Whether there are rules for secrets of a host."""
        return name in self._ruled or tls.wildcard(name) in self._ruled

    def _holds(self, connection: Connection) -> bool:
        """Whether a connection may go on; one that leads nowhere yet may."""
        name, address = connection.name, connection.address
        if name is None:
            return address is None or self._is_past(address)
        return self._leads_to(connection, name) and (address is None or self._is_open(address))

    def _leads_to(self, connection: Connection, name: str) -> bool:
        if connection.inside:
            return self.rules is not None and self.has_rule(name)
        return covers(self._names, name)

    def _is_open(self, address: str) -> bool:
        number = IPv4Address(address)
        return _within(number, self._allowed) or not _within(number, self._closed)

    def _is_past(self, address: str) -> bool:
        """Whether the ranges of the policy open an address of HTTPS, whatever is there."""
        number = IPv4Address(address)
        closed = _within(number, self._closed) or _within(number, self._denied)
        return bool(self._ruled) and (_within(number, self._allowed) or not closed)

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
            await connection.serve(http.serve if port == http.PORT else partial(tls.serve, self))
        except (OSError, TimeoutError):
            return

    def _end(self, connection: Connection, task: "asyncio.Task[None]") -> None:
        del self._serving[connection]
        connection.near.close()  # a task that was cancelled at once has not begun
        self._room.release()
        if not task.cancelled():
            task.exception()

    async def dial_past(self, connection: Connection) -> bool:
        """Lead a connection where the guest has called, if the policy opens that by address.

        Raises `Unreachable`.
        """
        address = _called(connection.near)
        if not self._is_past(address):
            return False
        connection.far = await self._call(connection, address, tls.PORT)
        if connection.far is None:
            raise Unreachable(f"{address} does not answer")
        return True

    async def _dial(self, connection: Connection, name: str, port: int) -> socket.socket:
        connection.name, connection.address = name, None
        if not self._leads_to(connection, name):
            raise self._denied_name(
                name, f"The network policy of this sandbox does not allow {name}"
            )
        found = await self._addresses(name)
        if not found:
            raise Unreachable(f"No address of {name} was found")
        usable = [each for each in found if self._is_open(each)]
        if not usable:
            raise self._denied_name(name, f"{name} leads to an address that is closed to sandboxes")
        for address in usable[:_ADDRESSES]:
            if (sock := await self._call(connection, address, port)) is not None:
                return sock
        raise Unreachable(f"{name} does not answer")

    async def _call(self, connection: Connection, address: str, port: int) -> socket.socket | None:
        """A connection to an address, None where it does not answer."""
        connection.address = address
        sock = await self._socket("tcp")
        try:
            async with asyncio.timeout(_DIAL_SEC):
                await asyncio.get_running_loop().sock_connect(sock, (address, port))
            return sock
        except (OSError, TimeoutError):
            sock.close()
            return None
        except BaseException:
            sock.close()
            raise

    def _denied_name(self, name: str, why: str) -> Denied:
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
                async with asyncio.timeout(_ANSWER_SEC):
                    answer = await self._asked(resolver, query)
                if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    continue
                found = answer.resolve_chaining().answer
            except (OSError, TimeoutError, dns.exception.DNSException):
                continue
            addresses = [] if found is None else [str(each) for each in found]
            return random.sample(addresses, len(addresses))
        return []

    async def _asked(
        self, resolver: str, query: dns.message.QueryMessage
    ) -> dns.message.QueryMessage:
        with await self._socket("udp") as sock:
            answer = await _asked(sock, resolver, query)
        if answer.flags & dns.flags.TC:
            with await self._socket("tcp") as sock:
                answer = await _asked_at_length(sock, resolver, query)
        return answer

    async def _socket(self, kind: str) -> socket.socket:
        try:
            return await self._open(kind)
        except OSError as error:
            raise Unreachable("This host has no connection left") from error


def _within(address: IPv4Address, ranges: Sequence[IPv4Network]) -> bool:
    return any(address in each for each in ranges)


def _called(near: socket.socket) -> str:
    """The address that a guest has called before the slot redirected it here."""
    found = near.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16)
    return socket.inet_ntoa(struct.unpack_from("4x4s", found)[0])


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


async def _asked_at_length(
    sock: socket.socket, resolver: str, query: dns.message.QueryMessage
) -> dns.message.QueryMessage:
    """By TCP, which has room for all of an answer."""
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (resolver, _DNS_PORT))
    await loop.sock_sendall(sock, query.to_wire(prepend_length=True))
    size = int.from_bytes(await _exactly(sock, 2))
    answer = dns.message.from_wire(await _exactly(sock, size))
    if not (query.is_response(answer) and isinstance(answer, dns.message.QueryMessage)):
        raise dns.exception.FormError
    return answer


async def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data
