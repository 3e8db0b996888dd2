"""What is closed is refused at once, in a way that tells nothing but the policy."""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial

import pytest

from support.network.played_guest import bound_udp, listening_tcp, udp_frame
from support.network.pools import PoolFactory
from support.network.world import World, a_world
from wrenn_sandbox.host.network import pool
from wrenn_sandbox.host.network.rules import REFUSALS_PER_SEC
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.slot import GATEWAY_IP
from wrenn_sandbox.model.network import NetworkPolicy

CLOSED = NetworkPolicy(internet=False)
UNREACHABLE, ADMIN_PROHIBITED = 3, 13
NAME_SERVER = (GATEWAY_IP, 53)
IN_TIME = 0.5
"""Seconds; without an answer a resolver waits for five and a TCP connection for minutes."""


@pytest.fixture
async def world(make_pool: PoolFactory, namespaces: NamespaceThread) -> AsyncIterator[World]:
    async with a_world(make_pool, namespaces) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        yield world


async def connecting(world: World, target: tuple[str, int]) -> int:
    """The error number that a TCP connection of the guest's ends with, in time."""
    with await world.namespaces.run(world.guest.netns, socket.socket) as sock:
        sock.setblocking(False)
        async with asyncio.timeout(IN_TIME):
            try:
                await asyncio.get_running_loop().sock_connect(sock, target)
            except OSError as error:
                return error.errno or 0
    return 0


async def asking(world: World, target: tuple[str, int]) -> int:
    """The error number that a question over UDP ends with, as a resolver asks it."""
    with await world.guest.udp() as sock:
        sock.connect(target)
        sock.send(b"question")
        async with asyncio.timeout(IN_TIME):
            try:
                await asyncio.get_running_loop().sock_recv(sock, 100)
            except OSError as error:
                return error.errno or 0
    return 0


def icmp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.setblocking(False)
    return sock


async def messages(sock: socket.socket, seconds: float = 0.3) -> list[bytes]:
    """The ICMP messages that arrive in this time, from their IP headers on."""
    found = []
    try:
        async with asyncio.timeout(seconds):
            while True:
                found.append(await asyncio.get_running_loop().sock_recv(sock, 2048))
    except TimeoutError:
        return found


async def test_a_slot_without_internet_refuses_name_lookups_at_once(world: World) -> None:
    await world.allow(CLOSED)
    for address in (GATEWAY_IP, world.outside.private_address, world.outside.second_address):
        assert await asking(world, (address, 53)) == errno.EHOSTUNREACH
        assert await connecting(world, (address, 53)) == errno.EHOSTUNREACH
    assert await connecting(world, (world.outside.second_address, 853)) == errno.EHOSTUNREACH


async def test_other_name_servers_are_refused_at_once(world: World) -> None:
    assert await asking(world, (world.outside.second_address, 53)) == errno.EHOSTUNREACH
    assert await connecting(world, (world.outside.second_address, 853)) == errno.EHOSTUNREACH


async def test_names_are_refused_where_nobody_resolves_them(
    make_pool: PoolFactory, namespaces: NamespaceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without name servers that guests could ask: none of the gateway's ports is open."""
    monkeypatch.setattr(pool, "resolvers", lambda configured: ())
    async with a_world(make_pool, namespaces) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        assert await asking(world, NAME_SERVER) == errno.EHOSTUNREACH
        assert await connecting(world, NAME_SERVER) == errno.EHOSTUNREACH


async def test_everything_is_refused_where_the_host_forwards_nothing(
    make_pool: PoolFactory, namespaces: NamespaceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_world(make_pool, namespaces) as world:
        monkeypatch.setattr(world.pool._builder, "internet", False)
        monkeypatch.setattr(world.pool, "_policies", {})
        await world.allow(NetworkPolicy())
        assert await asking(world, NAME_SERVER) == errno.EHOSTUNREACH
        assert await connecting(world, (world.outside.address, 80)) == errno.EHOSTUNREACH


async def test_closed_destinations_are_refused_at_once(world: World) -> None:
    second = world.outside.second_address
    with await world.listener(second, 80):
        assert await connecting(world, (second, 80)) == 0
        await world.allow(CLOSED)
        assert await connecting(world, (second, 80)) == errno.EHOSTUNREACH


async def test_a_refusal_does_not_tell_what_is_at_the_address(world: World) -> None:
    """All of it but the packet that it quotes is the same, also of addresses in use."""
    slot, outside = world.guest.slot, world.outside
    other = await world.pool.acquire()
    head, _, last = slot.host_ip.rpartition(".")
    hosts_end = f"{head}.{int(last) - 1}"
    in_use = (GATEWAY_IP, slot.host_ip, hosts_end, other.host_ip, outside.private_address)
    free = ("10.231.255.253", "10.0.0.1", "169.254.169.254", "192.168.77.1", "172.31.254.250")
    seen = set()
    with ExitStack() as stack:
        for netns in (slot.netns, None):  # whoever listens there does not matter
            for make in (bound_udp, listening_tcp):
                service = partial(make, "0.0.0.0", 17007)
                stack.enter_context(await world.namespaces.run(netns, service))
        stack.enter_context(await world.server(outside.private_address, 17007))
        hears = stack.enter_context(await world.namespaces.run(world.guest.netns, icmp))
        for address in (*in_use, *free):
            assert await connecting(world, (address, 17007)) == errno.EHOSTUNREACH, address
            assert await asking(world, (address, 17007)) == errno.EHOSTUNREACH, address
            for packet in await messages(hears, 0.05):
                assert socket.inet_ntoa(packet[12:16]) == GATEWAY_IP
                assert socket.inet_ntoa(packet[44:48]) == address  # as the guest wrote it
                kind, code = packet[20:22]
                assert (kind, code) == (UNREACHABLE, ADMIN_PROHIBITED)
                protocol, ttl, service_type = packet[37], packet[8], packet[1]
                seen.add((protocol, ttl, service_type, struct.unpack("!H", packet[2:4])))
    assert len(seen) == 2, seen  # one for each protocol


async def test_the_address_of_the_name_server_is_not_told(world: World) -> None:
    await world.allow(CLOSED)
    with await world.namespaces.run(world.guest.netns, icmp) as hears:
        assert await asking(world, NAME_SERVER) == errno.EHOSTUNREACH
        found = await messages(hears)
    assert [socket.inet_ntoa(each[44:48]) for each in found] == [GATEWAY_IP]
    assert not [each for each in found if socket.inet_aton(world.outside.private_address) in each]


async def test_a_flood_is_not_answered_packet_for_packet(world: World) -> None:
    with await world.namespaces.run(world.guest.netns, icmp) as hears:
        hears.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        for _ in range(10 * REFUSALS_PER_SEC):
            world.guest.send_frame(udp_frame("10.0.0.1"))
        found = len(await messages(hears))
    assert REFUSALS_PER_SEC // 2 < found < 3 * REFUSALS_PER_SEC
