"""Messages about connections: a policy that closes a connection closes them too."""

import asyncio
import socket
import struct
from contextlib import ExitStack
from ipaddress import IPv4Network

from support.network.pools import PoolFactory
from support.network.world import World, a_world, receive
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.model.network import NetworkPolicy


def raw_icmp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.setblocking(False)
    return sock


def checksum(data: bytes) -> bytes:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)


def unreachable(source: tuple[str, int], server: tuple[str, int]) -> bytes:
    """What a server says of a datagram that it got, to whoever sent it."""
    ends = socket.inet_aton(source[0]) + socket.inet_aton(server[0])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 29, 1, 0, 64, socket.IPPROTO_UDP, 0) + ends
    said = struct.pack("!BBHI", 3, 3, 0, 0) + head
    said += struct.pack("!HHHH", source[1], server[1], 9, 0) + b"x"
    return said[:2] + checksum(said + b"\0") + said[4:]


async def test_errors_come_from_where_a_connection_may_go(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    """A connection that a policy has closed is no way in for messages about it."""
    async with a_world(make_pool, namespaces) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        await judged(world)


async def judged(world: World) -> None:
    second, private = world.outside.second_address, world.outside.private_address
    only = (IPv4Network(second),)
    with ExitStack() as stack:
        sock = stack.enter_context(await world.guest.udp())
        heard = stack.enter_context(await world.namespaces.run(world.guest.netns, raw_icmp))
        teller = stack.enter_context(await world.namespaces.run(world.outside.netns, raw_icmp))
        about = {}
        for address, port, asked in ((second, 9, second), (private, 53, "169.254.0.22")):
            server = stack.enter_context(await world.server(address, port))
            sock.sendto(b"x", (asked, port))
            _, asker = await receive(server)
            about[asker[0], asked] = unreachable(asker, (address, port))

        async def told() -> set[str]:
            """About whom the guest hears, of all who say something."""
            for (source, _), message in about.items():
                teller.sendto(message, (source, 0))
            found: set[str] = set()
            while True:
                try:
                    async with asyncio.timeout(0.2):
                        packet = await asyncio.get_running_loop().sock_recv(heard, 2048)
                except TimeoutError:
                    return found
                found.add(socket.inet_ntoa(packet[44:48]))

        assert await told() == {second, "169.254.0.22"}
        for policy, expected in (
            (NetworkPolicy(internet=False), set()),
            (NetworkPolicy(deny=only), {"169.254.0.22"}),
            (NetworkPolicy(internet=False, allow=only), {second}),
            (NetworkPolicy(), {second, "169.254.0.22"}),
        ):
            await world.allow(policy)
            assert await told() == expected, policy
