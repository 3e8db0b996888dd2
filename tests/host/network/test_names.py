"""Egress by name: a guest's requests through real slots and the proxy's process."""

import asyncio
import ctypes
import errno
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path

import dns.message
import pytest

from support.api_server import eventually
from support.certificates import make_pair
from support.network.named import Hosts, hosts
from support.network.played_guest import ipv6_frame, udp_frame
from support.network.pools import NETWORK, PoolFactory
from support.network.world import a_world, receive
from wrenn_sandbox.host.egress import proxy
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.slot import GUEST_IP, Denials
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.guest import AGENT_PORT

NAMED = NetworkPolicy(internet=False, names=("allowed.example", "*.wild.example"))


@pytest.fixture
async def found(
    make_pool: PoolFactory, namespaces: NamespaceThread, tmp_path: Path
) -> AsyncIterator[Hosts]:
    """Hosts with names, and a guest that may call some. Names lead to the second address."""
    private = IPv4Network("172.31.0.0/16")
    async with a_world(make_pool, namespaces, allowable=[private]) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        await world.allow(NAMED)
        async with hosts(world, make_pair(tmp_path)) as found:
            for name in ("allowed.example", "a.wild.example", "other.example"):
                found.addresses[name] = (world.outside.second_address,)
            yield found


async def test_a_name_is_reached_by_http_and_tls(found: Hosts) -> None:
    """Wherever the guest believes that it is."""
    outside = found.world.outside
    for address in (outside.address, outside.second_address, "192.0.2.1"):
        for name in ("allowed.example", "ALLOWED.example.", "a.wild.example"):
            answer = await found.get(name, address=address)
            assert (answer.status, answer.body) == (200, f"{outside.second_address} ")
            assert await found.tls(name, address=address) == f"{outside.second_address}\n".encode()


async def test_a_name_with_more_addresses_than_fit_into_a_datagram(found: Hosts) -> None:
    closed = [f"10.99.{number}.1" for number in range(100)]
    found.addresses["allowed.example"] = (*closed, found.world.outside.address)
    assert (await found.get("allowed.example")).status == 200


async def test_other_names_are_refused_and_counted(found: Hosts) -> None:
    slot = found.world.guest.slot
    assert found.world.pool.denials(slot) == Denials()
    for name in ("other.example", "wild.example", "allowed.example.evil.example", "203.0.113.3"):
        answer = await found.get(name, address=found.world.outside.second_address)
        assert answer.status == 403
        assert name in answer.body
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        await found.tls("other.example")
    with pytest.raises((ssl.SSLError, OSError)):
        await found.tls(None)
    expected = ("wild.example", "allowed.example.evil.example", "203.0.113.3", "other.example")
    await eventually(lambda: found.world.pool.denials(slot) == Denials(5, expected))
    assert found.asked == []


async def test_each_request_of_a_connection_is_judged(found: Hosts) -> None:
    async with await found.open(found.world.outside.address, 80) as call:
        for name in ("allowed.example", "a.wild.example", "allowed.example"):
            answer = await call.request(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")
            assert answer.status == 200
        answer = await call.request(
            "POST / HTTP/1.1\r\nHost: allowed.example\r\nContent-Length: 5\r\n\r\nhello"
        )
        assert answer.body.endswith(" hello")
        answer = await call.request("GET / HTTP/1.1\r\nHost: other.example\r\n\r\n")
        assert answer.status == 403
        assert await call.ended() == b""
    assert not any("other.example" in each for each in found.asked)


_ODD = {
    "absolute": "GET http://other.example/ HTTP/1.1\r\nHost: allowed.example\r\n\r\n",
    "connect": "CONNECT allowed.example:443 HTTP/1.1\r\nHost: allowed.example\r\n\r\n",
    "two hosts": "GET / HTTP/1.1\r\nHost: allowed.example\r\nHost: other.example\r\n\r\n",
    "no host": "GET / HTTP/1.0\r\n\r\n",
    "port": "GET / HTTP/1.1\r\nHost: allowed.example:8080\r\n\r\n",
    "user": "GET / HTTP/1.1\r\nHost: other.example@allowed.example\r\n\r\n",
    "space": "GET / HTTP/1.1\r\nHost : allowed.example\r\n\r\n",
    "two lengths": "POST / HTTP/1.1\r\nHost: allowed.example\r\nContent-Length: 40\r\n"
    "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
    "no http": "\x16\x03\x01 this is not HTTP\r\n\r\n",
    "long": f"GET / HTTP/1.1\r\nHost: allowed.example\r\nX: {'x' * 100_000}\r\n\r\n",
}


@pytest.mark.parametrize("case", _ODD)
async def test_odd_requests_are_not_passed_on(found: Hosts, case: str) -> None:
    async with await found.open(found.world.outside.address, 80) as call:
        assert (await call.request(_ODD[case])).status in (400, 431)
        await call.ended()
    assert found.asked == []


async def test_websockets_are_passed_on_and_no_other_protocol(found: Hosts) -> None:
    head = "GET / HTTP/1.1\r\nHost: allowed.example\r\nConnection: keep-alive, Upgrade\r\n"
    async with await found.open(found.world.outside.address, 80) as call:
        assert (await call.request(head + "Upgrade: websocket\r\n\r\nearly,")).status == 101
        call.writer.write(b"late")
        call.writer.write_eof()
        assert await call.ended() == b"EARLY,LATE"
    async with await found.open(found.world.outside.address, 80) as call:
        answer = await call.request(head + "Upgrade: h2c\r\nHTTP2-Settings: AAMA\r\n\r\n")
        assert answer.status == 200
    assert "h2c" not in found.asked[-1].lower() + found.asked[-1]
    assert "upgrade" not in found.asked[-1].lower()


async def test_a_name_that_leads_to_a_closed_address_is_refused(found: Hosts) -> None:
    """Whoever rules its zone changes that at will."""
    world = found.world
    private = world.outside.private_address
    for address in (
        private,
        "10.231.0.1",
        "127.0.0.1",
        "169.254.169.254",
        world.guest.slot.host_ip,
    ):
        found.addresses["allowed.example"] = (address,)
        assert (await found.get("allowed.example")).status == 403, address
        with pytest.raises(ssl.SSLError):
            await found.tls("allowed.example")
    assert found.connected == 0
    opened = NetworkPolicy(internet=False, allow=(IPv4Network(private),), names=NAMED.names)
    await world.allow(opened)
    found.addresses["allowed.example"] = ("10.231.0.1", private)
    assert (await found.get("allowed.example")).body == f"{private} "
    found.addresses.clear()
    assert (await found.get("allowed.example")).status == 502


async def test_nothing_else_is_opened(found: Hosts) -> None:
    """No other port or protocol of the same host, no address, and not the proxy itself."""
    world = found.world
    second, end = world.outside.second_address, world.outside.address
    for port in (8080, 15080, 22):
        with pytest.raises(OSError):
            await found.open(second, port)
    for address in ("169.254.0.22", world.outside.private_address, world.guest.slot.host_ip):
        for port in (80, 443, 15080, 15443):
            with pytest.raises(OSError):
                await found.open(address, port)
    world.guest.forget_seen()
    for port in (80, 443, 9):
        world.guest.send_frame(udp_frame(second, port=port))
    world.guest.send_frame(ipv6_frame("2001:db8::1"))
    await world.allow(NetworkPolicy(allow=(IPv4Network(end),)))
    world.guest.send_frame(udp_frame(end))
    assert await world.guest.left_until(end) == [end]


async def test_names_open_the_resolvers(found: Hosts) -> None:
    with await found.world.guest.udp() as sock:
        query = dns.message.make_query("allowed.example", "A")
        sock.sendto(query.to_wire(), ("169.254.0.22", 53))
        answer = dns.message.from_wire((await receive(sock))[0])
    assert found.world.outside.second_address in str(answer)


async def test_what_addresses_open_goes_past_the_proxy(found: Hosts) -> None:
    """To a host that no name of the policy is for."""
    outside = found.world.outside
    address = (IPv4Network(outside.address),)
    for policy in (
        NetworkPolicy(internet=False, allow=address, names=NAMED.names),
        NetworkPolicy(deny=(IPv4Network(outside.second_address),), names=NAMED.names),
    ):
        await found.world.allow(policy)
        answer = await found.get("other.example", address=outside.address)
        assert answer.body == f"{outside.address} "
        answer = await found.get("other.example", address=outside.second_address)
        assert answer.status == 403
        answer = await found.get("allowed.example", address=outside.second_address)
        assert answer.status == 200


async def test_a_change_holds_for_open_connections(found: Hosts) -> None:
    world = found.world
    head = "GET / HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    kept = await found.open(world.outside.address, 80)
    cut = await found.open(world.outside.address, 80)
    async with kept, cut:
        assert (await kept.request(head.format("a.wild.example"))).status == 101
        assert (await cut.request(head.format("allowed.example"))).status == 101
        await world.allow(NetworkPolicy(internet=False, names=("a.wild.example", "other.example")))
        assert await cut.ended() == b""
        assert (await found.get("allowed.example")).status == 403
        assert (await found.get("other.example")).status == 200
        kept.writer.write(b"still")
        assert await kept.reader.readexactly(5) == b"STILL"
        await world.allow(NetworkPolicy(internet=False))
        assert await kept.ended() == b""
    assert world.pool.denials(world.guest.slot) is None
    with pytest.raises(OSError):
        await found.get("other.example")


async def test_a_proxy_that_is_killed_opens_nothing_and_is_started_again(found: Hosts) -> None:
    world = found.world
    async with await found.open(world.outside.address, 80) as call:
        assert (await call.request("GET / HTTP/1.1\r\nHost: allowed.example\r\n\r\n")).status == 200
        os.kill(world.pool.proxy_pid, signal.SIGKILL)
        assert await call.ended() == b""
    asked = len(found.asked)
    with pytest.raises(OSError):
        await found.get("other.example", address=world.outside.second_address)
    assert len(found.asked) == asked

    async with asyncio.timeout(patience(20)):
        while True:
            with suppress(OSError, EOFError):
                assert (await found.get("allowed.example")).status == 200
                return
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    "said", [b"no JSON", b'{"open": 1, "slot": 0, "kind": "raw"}', b'{"denied": "0"}']
)
async def test_a_process_that_does_not_keep_to_the_form_is_ended(
    found: Hosts, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """Whoever has taken it over."""
    pool, first = found.world.pool, found.world.pool.proxy_pid
    program = f"""
import socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
control.send({said!r})
while True:
    control.recv(100_000)
"""
    with monkeypatch.context() as patch:
        patch.setattr(proxy, "_program", program.encode)
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: pool.proxy_pid not in (0, first))
        captured = pool.proxy_pid
        await eventually(lambda: pool.proxy_pid != captured)
    await found.world.allow(NetworkPolicy(internet=False))
    await found.world.allow(NAMED)
    assert (await found.get("allowed.example")).status == 200


async def test_the_process_has_no_rights_and_no_network(found: Hosts) -> None:
    facts = await asyncio.to_thread(facts_of, found.world.pool.proxy_pid)
    assert len(set(facts["Uid"].split())) == 1
    assert int(facts["Uid"].split()[0]) >= 720_000 + NETWORK.num_addresses // 2
    assert {int(facts[each], 16) for each in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert facts["NoNewPrivs"] == "1"
    assert facts["interfaces"] == "lo"
    assert facts["home of root"] == "False"


def facts_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    process = Path(f"/proc/{pid}")
    lines = (process / "status").read_text().splitlines()
    links = (process / "net" / "dev").read_text().splitlines()[2:]
    return {
        **{key: value.strip() for key, _, value in (line.partition(":") for line in lines)},
        "interfaces": " ".join(each.split(":")[0].strip() for each in links),
        "home of root": str((process / "root" / "root").exists()),
    }


async def test_sandboxes_are_told_apart(
    found: Hosts, make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    """A slot's names are of no use to the next guest of it."""
    world = found.world
    other = await world.pool.acquire()
    await world.pool.apply(other, NetworkPolicy(internet=False, names=("other.example",)))
    assert (await found.get("other.example")).status == 403
    assert (await found.get("allowed.example")).status == 200
    world.pool.release(other)
    await world.pool.filled()
    again = await world.pool.acquire()
    assert again.index == other.index
    await world.pool.apply(again, NetworkPolicy(internet=False))
    assert world.pool.denials(again) is None


async def test_a_captured_monitor_calls_nobody_from_the_slot(found: Hosts) -> None:
    """The rules know the proxy's calls by their mark, which takes a right that monitors lack."""
    world = found.world

    def call(address: str, port: int) -> None:
        with socket.socket() as sock:
            sock.settimeout(0.5)
            sock.connect((address, port))

    for address, port in ((world.outside.second_address, 80), ("169.254.0.22", 15080)):
        with pytest.raises(OSError):
            await world.namespaces.run(world.guest.slot.netns, partial(call, address, port))


async def test_no_socket_of_a_captured_proxy_reaches_the_agent(found: Hosts) -> None:
    """Not even one that listens and is made to call."""

    def call(make: Callable[[], socket.socket]) -> None:
        with make() as sock:
            sock.setblocking(False)
            with suppress(OSError):  # of a family that is none: it listens no more
                ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)
            sock.settimeout(5)
            sock.connect((GUEST_IP, AGENT_PORT))

    netns = found.world.guest.slot.netns
    for make in (partial(proxy._listening, 15_099), partial(proxy._calling, "tcp")):
        with pytest.raises(OSError) as caught:
            await found.world.namespaces.run(netns, partial(call, make))
        assert caught.value.errno == errno.EHOSTUNREACH


def test_a_process_that_outlived_its_server_is_ended() -> None:
    command = ["sleep", "60"]
    with (
        subprocess.Popen(command, user=719_998, group=719_998) as left,
        subprocess.Popen(command, user=719_999, group=719_999) as other,
    ):
        proxy.end_processes_of(719_998)
        assert left.wait(5) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


async def test_a_proxy_that_is_slow_to_hear_is_told_later(found: Hosts) -> None:
    pid = found.world.pool.proxy_pid
    long = tuple(f"{'x' * 60}.{'y' * 60}.{number}.example" for number in range(100))
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(30):
            await found.world.allow(NetworkPolicy(internet=False, names=long[number:]))
        await found.world.allow(NAMED)
    finally:
        os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(0.5)  # it still hears of the policies in between, and cuts
    assert (await found.get("allowed.example")).status == 200
    assert found.world.pool.proxy_pid == pid


async def test_a_new_server_takes_slots_with_names_over(
    found: Hosts, make_pool: PoolFactory
) -> None:
    world = found.world
    index = world.guest.slot.index
    await world.pool.close(keep={index})
    with pytest.raises(OSError):
        await found.get("allowed.example")
    name_server = (world.outside.private_address,)
    pool = make_pool(size=0, dns_servers=name_server)
    await pool.start(keep={index: NAMED})
    assert (await found.get("allowed.example")).status == 200
    assert (await found.get("other.example")).status == 403
    assert pool.applied(world.guest.slot) == NAMED


async def test_a_guest_has_so_many_connections_at_once(found: Hosts) -> None:
    """Those above wait their turn; another sandbox does not notice."""
    async with AsyncExitStack() as stack:
        for _ in range(80):
            call = await found.open(found.world.outside.address, 80)
            await stack.enter_async_context(call)
        waiting = asyncio.create_task(found.get("allowed.example"))
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        assert not done
    assert (await waiting).status == 200
