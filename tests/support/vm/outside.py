"""A stretch of internet and of private network in a namespace, and ears on what is sent."""

import contextlib
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.patience import patience

_ALL = 3
_IPV4 = 0x0800
_OUTGOING = 4


@dataclass(frozen=True)
class Packet:
    """An Ethernet frame, and of IPv4 the addresses."""

    kind: int
    source: str
    target: str
    frame: bytes

    @classmethod
    def of(cls, frame: bytes) -> "Packet":
        kind: int = struct.unpack_from("!H", frame, 12)[0]
        source = target = ""
        if kind == _IPV4 and len(frame) >= 34:
            source, target = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
        return cls(kind, source, target, frame)


class Ear:
    """Hears what arrives over an interface; on all of a namespace's without a name."""

    def __init__(self, interface: str | None) -> None:
        # with protocol 0 nothing comes from other interfaces before it is bound
        protocol = socket.htons(_ALL) if interface is None else 0
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, protocol)
        self._socket.setblocking(False)
        if interface is not None:
            self._socket.bind((interface, _ALL))

    def heard(self) -> list[Packet]:
        """What arrived since the last time."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (_, _, direction, _, _) = self._socket.recvfrom(65_536)
                if direction != _OUTGOING:
                    found.append(Packet.of(frame))
        return found

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Outside:
    """`servers` are on the internet, `private` ones are not; all are routed on this host.

    `host` is an address of this host's that looks as public as the servers'.
    """

    netns: str
    namespaces: NamespaceThread
    servers: tuple[str, str]
    private: tuple[str, ...]
    host: str

    def udp(self, address: str, port: int) -> socket.socket:
        """A server that waits at most ten seconds for a packet."""
        return self.namespaces.run_sync(self.netns, partial(_udp, address, port))

    def listener(self, address: str, port: int) -> socket.socket:
        """A TCP server that waits at most ten seconds for a connection."""
        return self.namespaces.run_sync(self.netns, partial(_listener, address, port))

    def ear(self) -> Ear:
        return self.namespaces.run_sync(self.netns, lambda: Ear(None))


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    """Joined to this host by a veth pair of its own, as if by an uplink."""
    name = "wtest-" + secrets.token_hex(3)
    link, number = "wt" + name[-6:], secrets.randbelow(30)
    public = f"203.0.113.{8 * number}"
    host, *servers = (_plus(public, each) for each in (1, 2, 3))
    private = tuple(
        f"{net}.{number + 101}.77" for net in ("10.99", "172.27", "192.168", "100.99", "198.19")
    )
    namespaces = NamespaceThread("outside")
    try:
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"{host}/29", "dev", link)
        _ip("link", "set", link, "up")
        for each in ("lo", "eth0"):
            _ip("-n", name, "link", "set", each, "up")
        for each in servers:
            _ip("-n", name, "addr", "add", f"{each}/29", "dev", "eth0")
        for each in private:
            _ip("-n", name, "addr", "add", f"{each}/32", "dev", "eth0")
            _ip("route", "add", f"{each}/32", "dev", link)
        Path(f"/proc/sys/net/ipv4/conf/{link}/forwarding").write_text("1")
        found = Outside(name, namespaces, (servers[0], servers[1]), private, host)
        _until_carried(found)
        yield found
    finally:
        namespaces.close()
        if link in {each for _, each in socket.if_nameindex()}:
            _ip("link", "del", link)
        _ip("netns", "del", name)


def _until_carried(outside: Outside) -> None:
    """The link drops packets for a moment: ask each address until it has heard one."""
    for address in (*outside.servers, *outside.private):
        with outside.udp(address, 7) as server, _udp("0.0.0.0", 0) as asker:
            server.settimeout(patience(0.02))
            for _ in range(500):
                asker.sendto(b"there?", (address, 7))
                with contextlib.suppress(TimeoutError):
                    server.recv(100)
                    break
            else:
                raise TimeoutError(f"{address} is not reached from this host")


def sent_within(sock: socket.socket, seconds: float) -> bytes:
    """What a connection receives in this time, from now on."""
    end, found = time.monotonic() + seconds, b""
    while (left := end - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            piece = sock.recv(65_536)
        except TimeoutError:
            break
        if not piece:
            break
        found += piece
    return found


def _udp(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(patience(10))
    sock.bind((address, port))
    return sock


def _listener(address: str, port: int) -> socket.socket:
    sock = socket.create_server((address, port))
    sock.settimeout(patience(10))
    return sock


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _plus(address: str, number: int) -> str:
    head, _, last = address.rpartition(".")
    return f"{head}.{int(last) + number}"
