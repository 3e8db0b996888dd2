"""What a hostile guest reaches: packets through a real slot, with a namespace as the guest."""

import asyncio
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from support.network.played_guest import arp_frame, bound_udp, ipv6_frame, listening_tcp, udp_frame
from support.network.pools import PoolFactory, run
from support.network.world import World, a_world, receive
from wrenn_sandbox.host.privileged.guest_socket import connect_guest, guest_socket
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.slot import GUEST_MAC, TAP_NAME, UPLINK_NAME, Slot
from wrenn_sandbox.model.network import NetworkPolicy

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


NO_OPERATIONS = b"\x01" * 4
SOURCE_ROUTE = b"\x01\x83\x07\x04" + bytes(4)


ECHO_REQUEST = b"\x08\x00\xf7\xff" + bytes(4)
ECHO_REPLY = 0
UNASKED_REPLY = b"\x00\x00\xff\xff" + bytes(4)
STRANGER = "02:00:00:00:00:07"


def raw_icmp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.setblocking(False)
    return sock


@pytest.fixture
async def world(make_pool: PoolFactory, namespaces: NamespaceThread) -> AsyncIterator[World]:
    async with a_world(make_pool, namespaces) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        yield world


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
    guest.send_frame(udp_frame(world.outside.second_address, source_mac=STRANGER))
    guest.send_frame(udp_frame(world.outside.second_address, options=NO_OPERATIONS))
    guest.send_frame(udp_frame(world.outside.second_address, options=SOURCE_ROUTE))
    guest.send_frame(udp_frame(world.outside.second_address, vlan=7))
    guest.send_frame(udp_frame(world.outside.private_address, vlan=0))
    guest.send_frame(ipv6_frame("2001:db8::1"))
    guest.send_frame(ipv6_frame("ff02::1"))
    guest.send_frame(bytes(14))
    guest.send_frame(udp_frame(target))
    assert await guest.left_until(target) == [target]


async def test_forged_arp_leaves_no_trace(world: World) -> None:
    """What all slots remember of neighbours has to fit in one table of this machine."""
    guest = world.guest
    for asker in ("198.51.100.7", "169.254.0.22", guest.slot.host_ip):
        guest.send_frame(arp_frame(source=asker))
    for forged in ({"source_mac": STRANGER}, {"claimed_mac": STRANGER}):
        guest.send_frame(arp_frame(source="169.254.0.21", **forged))
    known = run("ip", "-n", str(guest.slot.netns), "neigh", "show", "dev", TAP_NAME)
    assert known.split() == ["169.254.0.21", "lladdr", GUEST_MAC, "PERMANENT"]


async def test_what_belongs_to_no_connection_goes_nowhere(world: World) -> None:
    with (
        await world.namespaces.run(world.guest.netns, raw_icmp) as sock,
        await world.guest.udp() as last,
    ):
        sock.sendto(UNASKED_REPLY, (world.outside.second_address, 0))
        last.sendto(b"x", (world.outside.address, 9))
        assert await world.guest.left_until(world.outside.address) == [world.outside.address]


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
        connection = await connect_guest(world.namespaces, world.guest.slot)
        with connection:
            loop = asyncio.get_running_loop()
            server, peer = await loop.sock_accept(listener)
            with server:
                assert peer[0] == "169.254.0.22"
                await loop.sock_sendall(server, b"agent")
                assert await loop.sock_recv(connection, 100) == b"agent"
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_another_port_of_the_guest_is_reached_by_what_bears_the_mark(world: World) -> None:
    with (
        await world.guest.tcp_listener(3000) as listener,
        await connect_guest(world.namespaces, world.guest.slot, 3000) as connection,
    ):
        loop = asyncio.get_running_loop()
        server, _ = await loop.sock_accept(listener)
        with server:
            await loop.sock_sendall(server, b"port")
            assert await loop.sock_recv(connection, 100) == b"port"


async def test_no_other_port_of_the_guest_is_reached(world: World) -> None:
    loop, slot = asyncio.get_running_loop(), world.guest.slot
    one = await guest_socket(world.namespaces, slot)
    with one, await world.guest.tcp_listener(22), pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await loop.sock_connect(one, (slot.guest_ip, 22))


async def test_a_refused_connection_is_told_at_once(world: World) -> None:
    with pytest.raises(ConnectionRefusedError):
        await connect_guest(world.namespaces, world.guest.slot)


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


async def test_fragments_are_judged_as_the_packets_that_they_are(world: World) -> None:
    long = b"long" * 750
    with (
        await world.server(world.outside.address, 9) as server,
        await world.guest.udp() as sock,
    ):
        for closed in ((world.outside.private_address, 9), (world.outside.second_address, 53)):
            sock.sendto(long, closed)
        sock.sendto(long, (world.outside.address, 9))
        assert (await receive(server))[0] == long
        assert set(await world.guest.left_until(world.outside.address)) == {world.outside.address}


async def test_only_the_internet_answers_pings(world: World) -> None:
    slot = world.guest.slot
    near = ("169.254.0.22", slot.host_ip, world.outside.host_address, "127.0.0.1", "10.231.0.1")
    with await world.namespaces.run(world.guest.netns, raw_icmp) as sock:
        for address in (*near, world.outside.private_address, world.outside.address):
            sock.sendto(ECHO_REQUEST, (address, 0))
        replies = []
        while world.outside.address not in replies:
            packet, (sender, _) = await receive(sock)
            if packet[20] == ECHO_REPLY and sender != "127.0.0.1":  # its own loopback
                replies.append(sender)
        assert replies == [world.outside.address]


async def test_nobody_outside_reaches_a_slot(world: World) -> None:
    slot = world.guest.slot
    route = ("route", "add", slot.host_ip, "via", world.outside.host_address)
    run("ip", "-n", world.outside.netns, *route)
    with (
        await world.namespaces.run(slot.netns, partial(bound_udp, "0.0.0.0", 7000)) as inside,
        await world.guest.udp(7000) as guest,
        await world.server(world.outside.address, 9) as server,
    ):
        server.sendto(b"unasked", (slot.host_ip, 7000))
        guest.sendto(b"x", (world.outside.address, 9))
        _, source = await receive(server)
        server.sendto(b"answer", source)
        assert await receive(guest) == (b"answer", (world.outside.address, 9))
        with pytest.raises(BlockingIOError):
            inside.recv(100)
        with pytest.raises(BlockingIOError):
            guest.recv(100)


async def test_the_host_lets_nobody_outside_into_a_slot(world: World) -> None:
    """Even if the slot's own rules were gone."""
    slot, far = world.guest.slot, (world.outside.address, 9)
    run("ip", "netns", "exec", str(slot.netns), "nft", "flush", "ruleset")
    route = ("route", "add", slot.host_ip, "via", world.outside.host_address)
    run("ip", "-n", world.outside.netns, *route)
    with (
        await world.namespaces.run(slot.netns, partial(bound_udp, slot.host_ip, 7000)) as inside,
        await world.server(*far) as server,
    ):
        server.sendto(b"unasked", (slot.host_ip, 7000))
        inside.sendto(b"x", far)
        server.sendto(b"answer", (await receive(server))[1])
        assert await receive(inside) == (b"answer", far)


def speak_ipv6(slot: Slot, link: str) -> tuple[str, str]:
    """Give both ends of a slot's link an IPv6 address: those of the host and of the slot."""
    netns, host_ip, slot_ip = str(slot.netns), "fd00:77::1", "fd00:77::2"
    speak = "for each in all {0}; do echo 0 > /proc/sys/net/ipv6/conf/$each/disable_ipv6; done"
    run("ip", "netns", "exec", netns, "sh", "-c", speak.format(UPLINK_NAME))
    Path(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6").write_text("0")
    run("ip", "addr", "add", f"{host_ip}/64", "dev", link, "nodad")
    run("ip", "-n", netns, "addr", "add", f"{slot_ip}/64", "dev", UPLINK_NAME, "nodad")
    mac = run("ip", "-br", "link", "show", link).split()[2]
    run("ip", "-n", netns, "neigh", "replace", host_ip, "lladdr", mac, "dev", UPLINK_NAME)
    return host_ip, slot_ip


@pytest.mark.skipif(not Path("/proc/sys/net/ipv6").is_dir(), reason="a kernel without IPv6")
async def test_the_host_hears_no_ipv6_of_a_slot(world: World) -> None:
    """Even if the slot spoke it and its own rules were gone."""
    slot = world.guest.slot
    run("ip", "netns", "exec", str(slot.netns), "nft", "flush", "ruleset")
    host_ip, slot_ip = speak_ipv6(slot, f"wrn{world.pool.tag}-{slot.index}")
    with (
        bound_udp(host_ip) as service,
        bound_udp(host_ip) as neighbour,
        await world.namespaces.run(slot.netns, partial(bound_udp, slot_ip)) as attacker,
    ):
        attacker.sendto(b"from the slot", service.getsockname())
        assert await world.guest.left_until("ipv6")
        neighbour.sendto(b"from the host", service.getsockname())
        assert (await receive(service))[0] == b"from the host"


async def test_a_slot_lets_nobody_in_to_its_guest(world: World) -> None:
    """Even if the host's own rules were gone."""
    guest, far = world.guest, (world.outside.address, 9)
    link = run("ip", "-n", str(guest.slot.netns), "-br", "link", "show", UPLINK_NAME).split()[2]
    frame = udp_frame("169.254.0.21", source=far[0], port=7000, target_mac=link)
    with await guest.udp(7000) as inside, await world.server(*far) as server:
        guest.send_to_slot(frame)
        inside.sendto(b"x", far)
        server.sendto(b"answer", (await receive(server))[1])
        assert await receive(inside) == (b"answer", far)
