"""A guest played by a namespace, a stretch of internet in another, and a wire tap between.

The guest's tap and the slot's are joined by copying frames, as a VMM does. What leaves the slot is
seen on the host's end of its veth pair: a packet that is not there by the time a later one is
was dropped in the slot.
"""

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.network.pools import WatchedPool, run
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.tap import attach_tap, open_tap
from wrenn_sandbox.host.slot import GATEWAY_IP, GUEST_MAC, TAP_MAC, Slot
from wrenn_sandbox.patience import patience

VNET_HEADER = bytes(10)
ETH_P_ALL = 3
ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_8021Q = 0x8100
ETH_P_IPV6 = 0x86DD


@dataclass(frozen=True)
class Internet:
    """A namespace with servers; the addresses are documentation and private ones."""

    netns: str
    address: str
    second_address: str
    private_address: str
    host_address: str


@asynccontextmanager
async def internet(namespaces: NamespaceThread) -> AsyncIterator[Internet]:
    """Joined to this machine by a veth pair of its own, as if by an uplink."""
    name = "wtest-" + secrets.token_hex(3)
    link, octet = "wt" + name[-6:], 8 * secrets.randbelow(30)
    public, private = f"203.0.113.{octet}", f"172.31.254.{octet}"
    world = Internet(
        netns=name,
        address=_plus(public, 2),
        second_address=_plus(public, 3),
        private_address=_plus(private, 2),
        host_address=_plus(public, 1),
    )
    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        for base in (public, private):
            run("ip", "addr", "add", f"{_plus(base, 1)}/29", "dev", link)
            run("ip", "-n", name, "addr", "add", f"{_plus(base, 2)}/29", "dev", "eth0")
        run("ip", "-n", name, "addr", "add", f"{world.second_address}/29", "dev", "eth0")
        run("ip", "link", "set", link, "up")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        _forward(link)
        await _until_carried(namespaces, world)
        yield world
    finally:
        if link in {each for _, each in socket.if_nameindex()}:
            run("ip", "link", "del", link)
        run("ip", "netns", "del", name)


async def _until_carried(namespaces: NamespaceThread, world: Internet) -> None:
    """A link that just came up drops packets for a moment: ask until one arrives."""
    loop = asyncio.get_running_loop()
    make = partial(bound_udp, world.address, 7)
    with await namespaces.run(world.netns, make) as server, bound_udp(world.host_address) as asker:
        for _ in range(500):
            asker.sendto(b"there?", (world.address, 7))
            try:
                async with asyncio.timeout(0.02):
                    await loop.sock_recv(server, 100)
                    return
            except TimeoutError:
                continue
    raise TimeoutError("the link to the played internet does not come up")


def _forward(link: str) -> None:
    Path(f"/proc/sys/net/ipv4/conf/{link}/forwarding").write_text("1")


def _plus(address: str, number: int) -> str:
    head, _, last = address.rpartition(".")
    return f"{head}.{int(last) + number}"


def bound_udp(address: str, port: int = 0) -> socket.socket:
    """A non-blocking UDP socket of the calling thread's namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((address, port))
    return sock


def listening_tcp(address: str, port: int) -> socket.socket:
    """A non-blocking listener of the calling thread's namespace."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.listen()
    return sock


class PlayedGuest:
    """The guest's side of a slot: sockets of a kernel of its own, or raw frames."""

    def __init__(self, namespaces: NamespaceThread, pool: WatchedPool, slot: Slot) -> None:
        self._namespaces = namespaces
        self._veth = f"wrn{pool.tag}-{slot.index}"
        self.slot = slot
        self.netns = "wtest-" + secrets.token_hex(3)
        self._undo = AsyncExitStack()
        self._slot_tap = -1
        self._wire: socket.socket

    async def __aenter__(self) -> "PlayedGuest":
        async with AsyncExitStack() as undo:
            undo.callback(run, "ip", "netns", "del", self.netns)
            run("ip", "netns", "add", self.netns)
            for line in (
                "tuntap add dev eth0 mode tap vnet_hdr",
                f"link set eth0 address {GUEST_MAC}",
            ):
                run("ip", "-n", self.netns, *line.split())
            guest_tap = await self._namespaces.run(self.netns, partial(attach_tap, "eth0"))
            undo.callback(os.close, guest_tap)
            for line in (
                "link set eth0 up",  # with its other side there, it carries packets at once
                "addr add 169.254.0.21/30 dev eth0",
                f"neigh replace 169.254.0.22 lladdr {TAP_MAC} dev eth0 nud permanent",
                "route add default via 169.254.0.22",
            ):
                run("ip", "-n", self.netns, *line.split())
            self._slot_tap = await open_tap(self._namespaces, self.slot)
            undo.callback(os.close, self._slot_tap)
            loop = asyncio.get_running_loop()
            for source, target in ((guest_tap, self._slot_tap), (self._slot_tap, guest_tap)):
                loop.add_reader(source, _copy_frame, source, target)
                undo.callback(loop.remove_reader, source)
            self._wire = undo.enter_context(
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            )  # protocol 0: nothing from other interfaces before it is bound
            self._wire.setblocking(False)
            self._wire.bind((self._veth, ETH_P_ALL))
            self._undo = undo.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._undo.aclose()

    async def udp(self, port: int = 0) -> socket.socket:
        return await self._namespaces.run(self.netns, partial(bound_udp, "169.254.0.21", port))

    async def tcp_listener(self, port: int) -> socket.socket:
        return await self._namespaces.run(self.netns, partial(listening_tcp, "169.254.0.21", port))

    def send_frame(self, frame: bytes) -> None:
        """Put a frame on the guest's side of the slot's tap, whatever it holds.

        When this returns, the slot's rules have judged it.
        """
        os.write(self._slot_tap, VNET_HEADER + frame)

    def send_to_slot(self, frame: bytes) -> None:
        """Put a frame on the slot's link to the host, past the rules of the host."""
        self._wire.send(frame)

    def forget_seen(self) -> None:
        """Forget the packets that have left so far."""
        self.left_so_far()

    async def left_until(self, last: str) -> list[str]:
        """Destinations of the IP packets that leave the slot, to the first one to `last`."""
        loop = asyncio.get_running_loop()
        seen: list[str] = []
        async with asyncio.timeout(patience(10)):
            while last not in seen:
                seen += _destination(*await loop.sock_recvfrom(self._wire, 2048))
        return seen

    def left_so_far(self) -> list[str]:
        """The same for those that have left by now."""
        seen: list[str] = []
        with suppress(BlockingIOError):
            while True:
                seen += _destination(*self._wire.recvfrom(2048))
        return seen


def _destination(frame: bytes, sender: tuple[str, int, int, int, bytes]) -> list[str]:
    """Where a packet that leaves a slot is bound for; of nothing else."""
    if frame[12:14] == struct.pack("!H", ETH_P_IPV6):
        return ["ipv6"]
    outgoing = sender[2] == socket.PACKET_OUTGOING
    is_ip = frame[12:14] == struct.pack("!H", ETH_P_IP)
    return [socket.inet_ntoa(frame[30:34])] if is_ip and not outgoing else []


def _copy_frame(source: int, target: int) -> None:
    try:
        os.write(target, os.read(source, 65_600))
    except BlockingIOError:
        return


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def udp_frame(
    destination: str,
    *,
    source: str = "169.254.0.21",
    source_mac: str = GUEST_MAC,
    options: bytes = b"",
    vlan: int | None = None,
    port: int = 9,
    target_mac: str = TAP_MAC,
) -> bytes:
    """An Ethernet frame with one UDP packet, from the guest unless it says otherwise.

    `options` are of the IP header, in whole words; with `vlan` the frame is tagged.
    """
    payload = b"frame"
    udp = struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45 + len(options) // 4,
        0,
        20 + len(options) + len(udp),
        1,
        0,
        64,
        socket.IPPROTO_UDP,
        0,
        socket.inet_aton(source),
        socket.inet_aton(destination),
    )
    checksum = struct.pack("!H", _checksum(header + options))
    header = header[:10] + checksum + header[12:] + options
    tag = b"" if vlan is None else struct.pack("!HH", ETH_P_8021Q, vlan)
    return mac(target_mac) + mac(source_mac) + tag + struct.pack("!H", ETH_P_IP) + header + udp


def arp_frame(*, source: str, source_mac: str = GUEST_MAC, claimed_mac: str = GUEST_MAC) -> bytes:
    """An Ethernet frame that asks who has the gateway's address, and says who asks."""
    head = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, 1)
    asker = mac(claimed_mac) + socket.inet_aton(source)
    asked = bytes(6) + socket.inet_aton(GATEWAY_IP)
    frame = mac(TAP_MAC) + mac(source_mac) + struct.pack("!H", ETH_P_ARP) + head
    return frame + asker + asked


def ipv6_frame(destination: str) -> bytes:
    """An Ethernet frame with an empty IPv6 packet."""
    header = struct.pack("!IHBB", 6 << 28, 0, 59, 64)
    addresses = socket.inet_pton(socket.AF_INET6, "fe80::21") + socket.inet_pton(
        socket.AF_INET6, destination
    )
    return mac(TAP_MAC) + mac(GUEST_MAC) + struct.pack("!H", ETH_P_IPV6) + header + addresses


def _checksum(header: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
