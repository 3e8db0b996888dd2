"""What a hostile guest reaches: packets through a real slot, with a namespace as the guest."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial

import pytest

from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.privileged.guest_socket import connect_guest, guest_socket
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.model.network import NetworkPolicy

from .conftest import PoolFactory, run
from .played_guest import (
    Internet,
    PlayedGuest,
    bound_udp,
    internet,
    ipv6_frame,
    listening_tcp,
    udp_frame,
)

SPECIAL = [
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.0.23",
    "169.254.1.1",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "192.0.0.192",
    "198.18.0.1",
    "0.1.2.3",
    "224.0.0.251",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
]


@dataclass(frozen=True)
class World:
    pool: SlotPool
    guest: PlayedGuest
    outside: Internet
    namespaces: NamespaceThread

    async def server(self, address: str, port: int) -> socket.socket:
        """A UDP server on the internet."""
        return await self.namespaces.run(self.outside.netns, partial(bound_udp, address, port))


@pytest.fixture
async def world(make_pool: PoolFactory, namespaces: NamespaceThread) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        outside = await stack.enter_async_context(internet(namespaces))
        pool = make_pool(size=0, dns_servers=(outside.private_address,))
        await pool.start()
        assert pool.internet, pool.internet_reason
        guest = PlayedGuest(namespaces, pool, await pool.acquire())
        await stack.enter_async_context(guest)
        await pool.apply(guest.slot, NetworkPolicy())
        made = World(pool, guest, outside, namespaces)
        await until_carried(made)
        guest.forget_seen()
        yield made


async def until_carried(world: World) -> None:
    """The veth pair of a new slot drops packets for a moment: ask until an answer arrives."""
    loop = asyncio.get_running_loop()
    with await world.server(world.outside.address, 7) as server, await world.guest.udp() as sock:
        loop.add_reader(server, lambda: server.sendto(b"here", server.recvfrom(100)[1]))
        try:
            for _ in range(500):
                sock.sendto(b"there?", (world.outside.address, 7))
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await loop.sock_recv(sock, 100)
                        return
        finally:
            loop.remove_reader(server)
    raise TimeoutError("the slot does not come up")


async def receive(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    async with asyncio.timeout(10):
        return await asyncio.get_running_loop().sock_recvfrom(sock, 2048)


async def test_the_internet_is_reached_and_answers(world: World) -> None:
    loop = asyncio.get_running_loop()
    address = (world.outside.address, 8000)
    make = partial(listening_tcp, *address)
    with (
        await world.namespaces.run(world.outside.netns, make) as listener,
        await world.namespaces.run(world.guest.netns, lambda: socket.socket()) as client,
    ):
        client.setblocking(False)
        async with asyncio.timeout(10):
            await loop.sock_connect(client, address)
            server, peer = await loop.sock_accept(listener)
            with server:
                assert peer[0] == world.outside.host_address
                await loop.sock_sendall(client, b"question")
                assert await loop.sock_recv(server, 100) == b"question"
                await loop.sock_sendall(server, b"answer")
                assert await loop.sock_recv(client, 100) == b"answer"


async def test_special_addresses_are_not_reached(world: World) -> None:
    with await world.guest.udp() as sock:
        for address in SPECIAL:
            world.guest.send_frame(udp_frame(address))
        sock.sendto(b"x", (world.outside.address, 9))
        assert await world.guest.left_until(world.outside.address) == [world.outside.address]


async def test_the_range_of_the_slots_is_not_reached(world: World) -> None:
    other = await world.pool.acquire()
    gateway = world.guest.slot.host_ip.rpartition(".")[0] + ".0"
    with await world.guest.udp() as sock:
        for address in (other.host_ip, gateway, "10.231.200.1"):
            sock.sendto(b"x", (address, 49983))
        sock.sendto(b"x", (world.outside.address, 9))
        assert await world.guest.left_until(world.outside.address) == [world.outside.address]


async def test_the_hosts_own_addresses_are_not_reached(world: World) -> None:
    """Also public ones: the packet leaves the slot and the host drops it."""
    own = world.outside.host_address
    with (
        bound_udp(own) as service,
        await world.server(world.outside.address, 9) as server,
        await world.guest.udp() as sock,
        bound_udp("0.0.0.0") as neighbour,
    ):
        sock.sendto(b"from the guest", service.getsockname())
        sock.sendto(b"x", (world.outside.address, 9))
        await receive(server)
        neighbour.sendto(b"from the host", service.getsockname())
        assert (await receive(service))[0] == b"from the host"


async def test_one_slot_does_not_reach_another_by_the_host(world: World) -> None:
    """Even if its own rules were gone, the host does not forward between slots."""
    other = await world.pool.acquire()
    run("ip", "netns", "exec", str(world.guest.slot.netns), "nft", "flush", "ruleset")
    run("ip", "netns", "exec", str(other.netns), "nft", "flush", "ruleset")
    loop = asyncio.get_running_loop()
    with (
        await world.namespaces.run(other.netns, partial(bound_udp, other.host_ip, 7000)) as victim,
        await world.namespaces.run(
            world.guest.slot.netns, partial(bound_udp, world.guest.slot.host_ip)
        ) as attacker,
        await world.server(world.outside.address, 9) as server,
    ):
        attacker.sendto(b"attack", (other.host_ip, 7000))
        attacker.sendto(b"x", (world.outside.address, 9))
        await receive(server)
        local = await world.namespaces.run(other.netns, partial(bound_udp, other.host_ip))
        with local:
            local.sendto(b"mine", (other.host_ip, 7000))
            assert (await loop.sock_recv(victim, 100)) == b"mine"


async def test_name_servers_are_reached_by_the_gateway_and_on_their_port_only(
    world: World,
) -> None:
    private = world.outside.private_address
    with (
        await world.server(private, 53) as resolver,
        await world.server(world.outside.address, 9) as server,
        await world.guest.udp() as sock,
    ):
        sock.sendto(b"question", ("169.254.0.22", 53))
        question, asker = await receive(resolver)
        assert question == b"question"
        resolver.sendto(b"answer", asker)
        assert await receive(sock) == (b"answer", ("169.254.0.22", 53))
        assert await world.guest.left_until(private) == [private]
        sock.sendto(b"x", (private, 80))
        sock.sendto(b"x", (world.outside.second_address, 53))
        sock.sendto(b"x", (world.outside.address, 9))
        await receive(server)
        assert await world.guest.left_until(world.outside.address) == [world.outside.address]


async def test_name_servers_are_reached_over_tcp(world: World) -> None:
    loop = asyncio.get_running_loop()
    make = partial(listening_tcp, world.outside.private_address, 53)
    with (
        await world.namespaces.run(world.outside.netns, make) as listener,
        await world.namespaces.run(world.guest.netns, lambda: socket.socket()) as client,
    ):
        client.setblocking(False)
        async with asyncio.timeout(10):
            await loop.sock_connect(client, ("169.254.0.22", 53))
            server, _ = await loop.sock_accept(listener)
            server.close()


async def test_forged_frames_go_nowhere(world: World) -> None:
    target = world.outside.address
    guest = world.guest
    guest.send_frame(udp_frame(world.outside.second_address, source="169.254.0.20"))
    guest.send_frame(udp_frame(world.outside.second_address, source="8.8.8.8"))
    guest.send_frame(udp_frame(world.outside.second_address, source=guest.slot.host_ip))
    guest.send_frame(udp_frame(world.outside.second_address, source_mac="02:00:00:00:00:07"))
    guest.send_frame(ipv6_frame("2001:db8::1"))
    guest.send_frame(ipv6_frame("ff02::1"))
    guest.send_frame(bytes(14))
    guest.send_frame(udp_frame(target))
    assert await guest.left_until(target) == [target]


async def test_services_in_the_slot_are_not_reached(world: World) -> None:
    slot = world.guest.slot
    with (
        await world.namespaces.run(slot.netns, partial(bound_udp, "0.0.0.0", 7000)) as service,
        await world.server(world.outside.address, 9) as server,
        await world.guest.udp() as sock,
    ):
        for address in ("169.254.0.22", slot.host_ip):
            sock.sendto(b"attack", (address, 7000))
        sock.sendto(b"x", (world.outside.address, 9))
        await receive(server)
        with pytest.raises(BlockingIOError):
            service.recv(100)


async def test_the_agent_is_reached_through_a_socket_of_the_slot(world: World) -> None:
    with await world.guest.tcp_listener(49983) as listener:
        connection = await connect_guest(world.namespaces, world.guest.slot, timeout=10)
        with connection:
            loop = asyncio.get_running_loop()
            server, peer = await loop.sock_accept(listener)
            with server:
                assert peer[0] == "169.254.0.22"
                await loop.sock_sendall(server, b"agent")
                assert await loop.sock_recv(connection, 100) == b"agent"
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_no_other_port_of_the_guest_is_reached(world: World) -> None:
    with await world.guest.tcp_listener(22), pytest.raises(TimeoutError):
        await connect_guest(world.namespaces, world.guest.slot, 22, timeout=0.2)


async def test_a_refused_connection_is_told_at_once(world: World) -> None:
    with pytest.raises(ConnectionRefusedError):
        await connect_guest(world.namespaces, world.guest.slot, timeout=10)


async def test_the_guest_is_not_reached_from_the_host_or_outside(world: World) -> None:
    """The namespace of this test has no way to the guest's address."""
    with await world.guest.tcp_listener(49983) as listener:
        with socket.socket() as direct:
            direct.setblocking(False)
            with pytest.raises((TimeoutError, OSError)):
                async with asyncio.timeout(0.2):
                    await asyncio.get_running_loop().sock_connect(
                        direct, (world.guest.slot.host_ip, 49983)
                    )
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_sockets_are_made_quickly(world: World) -> None:
    loop = asyncio.get_running_loop()
    samples = []
    for _ in range(50):
        start = loop.time()
        (await guest_socket(world.namespaces, world.guest.slot)).close()
        samples.append(loop.time() - start)
    assert sorted(samples)[25] < 0.005
