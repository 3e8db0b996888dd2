"""Network policies and limits: packets through a real slot, with a namespace as the guest."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv4Address, IPv4Network

import pytest

from support.network.played_guest import bound_udp, udp_frame
from support.network.pools import PoolFactory, run
from support.network.world import World, a_world, receive
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.network.builder import SlotBuilder
from wrenn_sandbox.host.network.rules import BURST_SEC, Limits
from wrenn_sandbox.host.privileged.conntrack import forget_connections
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.model.network import NetworkPolicy

CLOSED = NetworkPolicy(internet=False)


def ranges(*texts: str) -> tuple[IPv4Network, ...]:
    return tuple(map(IPv4Network, texts))


@pytest.fixture
async def world(make_pool: PoolFactory, namespaces: NamespaceThread) -> AsyncIterator[World]:
    async with a_world(make_pool, namespaces, allowable=ranges("172.31.0.0/16")) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        yield world


async def reached(world: World, *targets: tuple[str, int]) -> set[str]:
    """The addresses, as they are outside, to which the guest's packets get through."""
    end = world.outside.address
    for address, port in targets:
        world.guest.send_frame(udp_frame(address, port=port))
    # last of all one that arrives: what is not there by then was dropped
    await world.allow(NetworkPolicy(allow=ranges(end)))
    world.guest.send_frame(udp_frame(end))
    return {*await world.guest.left_until(end)} - {end}


def policies(world: World) -> Iterable[tuple[NetworkPolicy, set[str]]]:
    """Policies, and what is reached of the second address, a private one, and a name server."""
    second, private = world.outside.second_address, world.outside.private_address
    around = ranges("203.0.113.0/24")
    yield NetworkPolicy(), {second, "dns"}
    yield CLOSED, set()
    yield NetworkPolicy(deny=around), {"dns"}
    yield NetworkPolicy(deny=ranges("0.0.0.0/0")), {"dns"}
    yield NetworkPolicy(deny=around, allow=ranges(second)), {second, "dns"}
    yield NetworkPolicy(deny=ranges(second), allow=around), {second, "dns"}
    yield NetworkPolicy(internet=False, allow=ranges(second)), {second}
    yield NetworkPolicy(internet=False, allow=around, deny=ranges("0.0.0.0/0")), {second}
    yield NetworkPolicy(internet=False, allow=ranges(private)), {private}
    yield NetworkPolicy(allow=ranges(private, second, "203.0.113.0/24")), {second, private, "dns"}
    # what is closed to all stays closed even if such a policy came so far
    wide = ranges("10.0.0.0/8", "169.254.0.0/16", "0.0.0.0/0")
    yield NetworkPolicy(internet=False, allow=wide), {second, private}


async def test_what_each_policy_opens(world: World) -> None:
    second, private = world.outside.second_address, world.outside.private_address
    special = ("10.0.0.1", "169.254.169.254", "10.231.200.1", world.guest.slot.host_ip)
    for policy, expected in policies(world):
        await world.allow(policy)
        assert world.pool.applied(world.guest.slot) == policy
        others = [(address, 9) for address in (second, private, *special)]
        assert await reached(world, *others) == expected - {"dns"}, policy
        await world.allow(policy)
        named = await reached(world, ("169.254.0.22", 53), (second, 53), (second, 853))
        assert named == ({private} if "dns" in expected else set()), policy


async def test_a_slot_reaches_nothing_until_it_is_somebodys(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    async with a_world(make_pool, namespaces) as world:
        second = world.outside.second_address
        assert await reached(world, (second, 9), ("169.254.0.22", 53)) == set()
        await world.allow(NetworkPolicy())
        assert await reached(world, (second, 9)) == {second}


async def test_not_even_where_new_namespaces_forward_at_once(
    make_pool: PoolFactory, namespaces: NamespaceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do as this machine does."""
    make_pairs = SlotBuilder._make_pairs

    def forwarding(builder: SlotBuilder, indices: Sequence[int]) -> None:
        make_pairs(builder, indices)
        for index in indices:
            argv = ("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            run("ip", "netns", "exec", builder._plan.netns(index), *argv)

    monkeypatch.setattr(SlotBuilder, "_make_pairs", forwarding)
    async with a_world(make_pool, namespaces) as world:
        assert await reached(world, (world.outside.second_address, 9)) == set()
        assert run("ip", "-n", str(world.guest.slot.netns), "-6", "addr") == ""


async def test_an_open_connection_is_cut_and_goes_on(world: World) -> None:
    loop = asyncio.get_running_loop()
    client, server = await world.connected(world.outside.second_address, 8000)
    counted = {client: 0, server: 0}
    more = asyncio.Condition()

    async def send(sock: socket.socket) -> None:
        while True:
            await loop.sock_sendall(sock, b"x" * 100)
            await asyncio.sleep(0.005)

    async def count(sock: socket.socket) -> None:
        while data := await loop.sock_recv(sock, 65_536):
            counted[sock] += len(data)
            async with more:
                more.notify_all()

    async def flows() -> None:
        before = dict(counted)
        async with asyncio.timeout(5), more:
            await more.wait_for(lambda: all(counted[sock] > before[sock] for sock in counted))

    with client, server:
        tasks = [asyncio.create_task(work(each)) for each in counted for work in (send, count)]
        try:
            await flows()
            for policy in (
                NetworkPolicy(deny=ranges(world.outside.second_address)),
                CLOSED,
                NetworkPolicy(internet=False, allow=ranges(world.outside.address)),
            ):
                began = loop.time()
                await world.allow(policy)
                assert loop.time() - began < 0.9
                await asyncio.sleep(0.05)  # for what is in the sockets' queues already
                before = dict(counted)
                await asyncio.sleep(0.3)
                assert counted == before
                await world.allow(NetworkPolicy())
                await flows()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_answers_of_closed_servers_are_dropped(world: World) -> None:
    second, private = world.outside.second_address, world.outside.private_address
    await world.allow(NetworkPolicy(allow=ranges(private)))
    with ExitStack() as stack:
        sock = stack.enter_context(await world.guest.udp())
        sources = {}
        for address in (second, private, world.outside.address):
            server = stack.enter_context(await world.server(address, 9))
            sock.sendto(b"x", (address, 9))
            sources[server] = (await receive(server))[1]
        await world.allow(NetworkPolicy(deny=ranges(second)))
        for server, source in sources.items():
            server.sendto(b"late", source)
        assert await receive(sock) == (b"late", (world.outside.address, 9))
        with pytest.raises(BlockingIOError):
            sock.recv(100)


async def test_a_change_that_fails_is_known_and_made_good(world: World) -> None:
    second = world.outside.second_address
    run(
        "ip",
        "netns",
        "exec",
        str(world.guest.slot.netns),
        "nft",
        "delete",
        "table",
        "inet",
        "wrenn",
    )
    with pytest.raises(HostFailure, match="firewall"):
        await world.allow(CLOSED)
    assert world.pool.applied(world.guest.slot) is None
    await world.allow(CLOSED)
    assert world.pool.applied(world.guest.slot) == CLOSED
    assert await reached(world, (second, 9)) == set()


async def test_a_new_server_gives_its_rules_to_slots_in_use(
    make_pool: PoolFactory, world: World
) -> None:
    """Also to open connections; what it does not let policies open is closed."""
    second, private = world.outside.second_address, world.outside.private_address
    policy = NetworkPolicy(internet=False, allow=ranges(private, second))
    await world.allow(policy)
    index = world.guest.slot.index
    with (
        await world.server(private, 9) as server,
        await world.server(second, 9) as other,
        await world.guest.udp() as sock,
    ):
        for target in (private, second):
            sock.sendto(b"x", (target, 9))
        (_, source), (_, elsewhere) = await receive(server), await receive(other)
        await world.pool.close(keep={index})
        successor = make_pool(size=0)
        await successor.start(keep={index: policy})
        assert successor.applied(world.guest.slot) == policy
        server.sendto(b"late", source)
        other.sendto(b"later", elsewhere)
        assert await receive(sock) == (b"later", (second, 9))
        world.guest.forget_seen()
        for target in (private, world.outside.address, second):
            sock.sendto(b"x", (target, 9))
        assert await world.guest.left_until(second) == [second]


async def test_the_host_keeps_closed_what_no_policy_opens(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    """Even if the slot's own rules were gone."""
    async with a_world(make_pool, namespaces) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        slot, private = world.guest.slot, world.outside.private_address
        run("ip", "netns", "exec", str(slot.netns), "nft", "flush", "ruleset")
        make = partial(bound_udp, slot.host_ip)
        with (
            await world.server(private, 9) as closed,
            await world.server(private, 53) as resolver,
            await world.server(world.outside.address, 9) as server,
            await world.server(world.outside.second_address, 9) as untranslated,
            await world.namespaces.run(slot.netns, make) as sock,
        ):
            world.guest.send_frame(udp_frame(world.outside.second_address))
            for target in ((private, 9), (private, 53), (world.outside.address, 9)):
                sock.sendto(b"x", target)
            await receive(server)
            await receive(resolver)
            with pytest.raises(BlockingIOError):
                untranslated.recv(100)
            with pytest.raises(BlockingIOError):
                closed.recv(100)


Sockets = Callable[[], socket.socket]


async def flows_that_arrive(world: World, netns: str, make: Sockets, count: int) -> int:
    """How many of so many new flows get through, each of a socket of its own."""
    with ExitStack() as stack:
        server = stack.enter_context(await world.server(world.outside.second_address, 9))
        for _ in range(count):
            sock = stack.enter_context(await world.namespaces.run(netns, make))
            sock.sendto(b"x", (world.outside.second_address, 9))
        return await arrived_within(server)


async def arrived_within(server: socket.socket, seconds: float = 0.2) -> int:
    loop = asyncio.get_running_loop()
    found = set()
    while True:
        try:
            async with asyncio.timeout(seconds):
                found.add((await loop.sock_recvfrom(server, 100))[1])
        except TimeoutError:
            return len(found)


@pytest.mark.parametrize(
    ("limits", "most"),
    [(Limits(connections=20), 20), (Limits(connections_per_sec=4), 4 * BURST_SEC)],
)
async def test_new_connections_are_bounded_twice(
    make_pool: PoolFactory, namespaces: NamespaceThread, limits: Limits, most: int
) -> None:
    """In the slot, and by the host should the slot's kernel have forgotten some.

    What the slot drops does not leave it.
    """
    async with a_world(make_pool, namespaces, limits=limits) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        slot = world.guest.slot
        make = partial(bound_udp, "169.254.0.21")
        through = await flows_that_arrive(world, world.guest.netns, make, 2 * most)
        assert most // 2 < through <= most + 4
        assert world.guest.left_so_far().count(world.outside.second_address) == through
        other = await world.pool.acquire()
        await world.pool.apply(other, NetworkPolicy())
        for each in (slot, other):
            run("ip", "netns", "exec", str(each.netns), "nft", "flush", "ruleset")
        make = partial(bound_udp, slot.host_ip)
        assert await flows_that_arrive(world, str(slot.netns), make, 2 * most) <= 4
        make = partial(bound_udp, other.host_ip)
        through = await flows_that_arrive(world, str(other.netns), make, 2 * most)
        assert most // 2 < through <= most + 4


async def test_a_name_server_on_this_machine(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    """It is asked no more often than others are, whatever has become of the slot's own rules."""
    limits = Limits(connections=8)
    async with a_world(
        make_pool, namespaces, limits=limits, name_server=lambda outside: outside.host_address
    ) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        slot, here = world.guest.slot, (world.outside.host_address, 53)
        with ExitStack() as stack:
            resolver = stack.enter_context(bound_udp(*here))
            sock = stack.enter_context(await world.guest.udp())
            sock.sendto(b"question", ("169.254.0.22", 53))
            assert (await receive(resolver))[0] == b"question"
            run("ip", "netns", "exec", str(slot.netns), "nft", "flush", "ruleset")
            make = partial(bound_udp, slot.host_ip)
            for _ in range(16):
                asker = stack.enter_context(await world.namespaces.run(slot.netns, make))
                asker.sendto(b"x", here)
            assert 0 < await arrived_within(resolver) <= 8


async def test_the_next_in_a_slot_does_not_answer_for_its_predecessor(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    """Connections of a machine that is gone are nobody's, and the host forgets them."""
    async with a_world(make_pool, namespaces, limits=Limits(connections=4)) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        first = await world.pool.acquire()
        for slot in (first, None):
            used = slot or await world.pool.acquire()
            assert used.index == first.index
            await world.pool.apply(used, NetworkPolicy())
            run("ip", "netns", "exec", str(used.netns), "nft", "flush", "ruleset")
            make = partial(bound_udp, used.host_ip)
            assert await flows_that_arrive(world, str(used.netns), make, 16) == 4
            assert forget_connections(IPv4Address("10.231.255.254")) == 0
            if slot is not None:
                world.pool.release(used)
                await world.pool.filled()
        assert forget_connections(IPv4Address(first.host_ip)) == 4
        assert forget_connections(IPv4Address(first.host_ip)) == 0


async def test_a_connection_that_is_open_may_send_as_often_as_it_likes(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    """Also while nobody answers, when the kernel still takes it for a new one."""
    limits = Limits(connections=2, connections_per_sec=1)
    async with a_world(make_pool, namespaces, limits=limits) as world:
        await world.allow(NetworkPolicy())
        with (
            await world.server(world.outside.address, 9) as server,
            await world.guest.udp() as sock,
        ):
            async with asyncio.timeout(10):
                while True:  # until the veth pair carries
                    sock.sendto(b"first", (world.outside.address, 9))
                    try:
                        server.recv(100)
                        break
                    except BlockingIOError:
                        await asyncio.sleep(0.01)
            for number in range(100):
                sock.sendto(b"%d" % number, (world.outside.address, 9))
                while (await receive(server))[0] == b"first":
                    pass


async def test_bandwidth_is_bounded_in_both_directions(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    mbit, seconds = 16, 1.0
    async with a_world(make_pool, namespaces, limits=Limits(mbit_per_sec=mbit)) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        loop = asyncio.get_running_loop()
        client, server = await world.connected(world.outside.address, 8000)

        async def send(sock: socket.socket) -> None:
            while True:
                await loop.sock_sendall(sock, bytes(65_536))

        async def received(sock: socket.socket) -> int:
            total = 0
            try:
                async with asyncio.timeout(seconds):
                    while True:
                        total += len(await loop.sock_recv(sock, 65_536))
            except TimeoutError:
                return total

        with client, server:
            for source, target in ((client, server), (server, client)):
                sending = asyncio.create_task(send(source))
                total = await received(target)
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                possible = mbit * 1_000_000 / 8 * seconds
                assert 0.3 * possible < total < 1.25 * possible
