"""A slot with a played guest in it, and a stretch of internet to reach or not to reach."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path

from support.network.played_guest import Internet, PlayedGuest, bound_udp, internet, listening_tcp
from support.network.pools import PoolFactory, WatchedPool
from wrenn_sandbox.host.network.rules import Limits
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.patience import patience


@dataclass(frozen=True)
class World:
    pool: WatchedPool
    guest: PlayedGuest
    outside: Internet
    namespaces: NamespaceThread

    async def server(self, address: str, port: int) -> socket.socket:
        """A UDP server on the internet."""
        return await self.namespaces.run(self.outside.netns, partial(bound_udp, address, port))

    async def listener(self, address: str, port: int) -> socket.socket:
        """A TCP server on the internet."""
        return await self.namespaces.run(self.outside.netns, partial(listening_tcp, address, port))

    async def connected(self, address: str, port: int) -> tuple[socket.socket, socket.socket]:
        """Both ends of a TCP connection of the guest's, its own first."""
        loop = asyncio.get_running_loop()
        with await self.listener(address, port) as listener:
            client = await self.namespaces.run(self.guest.netns, socket.socket)
            client.setblocking(False)
            async with asyncio.timeout(patience(10)):
                await loop.sock_connect(client, (address, port))
                server, _ = await loop.sock_accept(listener)
        return client, server

    async def allow(self, policy: NetworkPolicy) -> None:
        """Give the guest this policy."""
        await self.pool.apply(self.guest.slot, policy)

    async def carries(self) -> None:
        """The veth pair of a new slot drops packets for a moment: ask until an answer arrives."""
        loop = asyncio.get_running_loop()
        with await self.server(self.outside.address, 7) as server, await self.guest.udp() as sock:
            loop.add_reader(server, lambda: server.sendto(b"here", server.recvfrom(100)[1]))
            try:
                for _ in range(500):
                    sock.sendto(b"there?", (self.outside.address, 7))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            await loop.sock_recv(sock, 100)
                            return self.guest.forget_seen()
            finally:
                loop.remove_reader(server)
        raise TimeoutError("the slot does not come up")


@asynccontextmanager
async def a_world(
    make_pool: PoolFactory,
    namespaces: NamespaceThread,
    *,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    allowable: Sequence[IPv4Network] = (),
    authorities: Path | None = None,
    name_server: Callable[[Internet], str] = lambda outside: outside.private_address,
) -> AsyncIterator[World]:
    """A world in which the guest's slot is still closed."""
    async with AsyncExitStack() as stack:
        outside = await stack.enter_async_context(internet(namespaces))
        servers = (name_server(outside),)
        pool = make_pool(
            size=0,
            dns_servers=servers,
            limits=limits,
            allowable=allowable,
            authorities=authorities,
        )
        await pool.start()
        assert pool.internet
        guest = PlayedGuest(namespaces, pool, await pool.acquire())
        await stack.enter_async_context(guest)
        yield World(pool, guest, outside, namespaces)


async def receive(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    async with asyncio.timeout(patience(10)):
        return await asyncio.get_running_loop().sock_recvfrom(sock, 4096)
