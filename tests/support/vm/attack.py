"""Runs inside a guest, as root: sends whatever might reach what is closed.

Argument: an `Order` as JSON. Prints a JSON list of what answered.
"""

import contextlib
import errno
import json
import select
import socket
import struct
import sys
from typing import TypedDict

GUEST, GATEWAY = "169.254.0.21", "169.254.0.22"
ITSELF = ("127.0.0.1", "0.0.0.0")
"""Addresses by which the guest reaches itself."""
MARK = b"WRENN-ATTACK"
FORGED = b"WRENN-FORGED"
IPV6_TARGETS = ("ff02::1", "fe80::1", "2001:db8::1", "fd00::2", "::ffff:10.0.0.1")


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def packet(source: str, target: str, protocol: int, payload: bytes, options: bytes = b"") -> bytes:
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x45 + len(options) // 4,
        0,
        20 + len(options) + len(payload),
        1,
        0,
        64,
        protocol,
        0,
        socket.inet_aton(source),
        socket.inet_aton(target),
    )
    total = checksum(head + options)
    return head[:10] + struct.pack("!H", total) + head[12:] + options + payload


def datagram(port: int, data: bytes) -> bytes:
    return struct.pack("!HHHH", 4000, port, 8 + len(data), 0) + data


def echo(data: bytes) -> bytes:
    head = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    return struct.pack("!BBHHH", 8, 0, checksum(head + data), 1, 1) + data


def syn(source: str, target: str, port: int) -> bytes:
    segment = struct.pack("!HHIIBBHHH", 4001, port, 1, 0, 0x50, 2, 1024, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, 20)
    return segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]


class Order(TypedDict):
    """Closed addresses, source addresses to forge, a server that is open and what it gets last."""

    targets: list[str]
    forged: list[str]
    open: str
    port: int
    end: str


class Attack:
    def __init__(self, order: Order) -> None:
        self.targets, self.forged = order["targets"], order["forged"]
        self.open, self.port, self.end = order["open"], order["port"], order["end"]
        self.device = next(name for _, name in socket.if_nameindex() if name != "lo")
        self.raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.wire.bind((self.device, 0))
        with open(f"/sys/class/net/{self.device}/address") as file:
            self.mac = bytes.fromhex(file.read().strip().replace(":", ""))
        self.peer = self.mac[:5] + bytes([self.mac[5] + 1])
        self.answers: list[str] = []

    def run(self) -> None:
        ping = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        with ping, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            for target in self.targets:
                names = () if target == GATEWAY else (53,)  # there it leads to the name server
                for port in (self.port, *names, 853, 80, 49983):
                    with contextlib.suppress(OSError):
                        udp.sendto(MARK, (target, port))
                with contextlib.suppress(OSError):
                    ping.sendto(echo(MARK), (target, 0))
                self.frames(target)
            self.connect()
            self.forge()
            self.ipv6()
            self.arp()
            for name, sock in (("udp", udp), ("ping", ping)):
                while select.select([sock], [], [], 0)[0]:
                    data, sender = sock.recvfrom(2048)
                    if sender[0] not in ITSELF and (name == "udp" or data[20] == 0):
                        self.answers.append(f"{name} {sender[0]}")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(self.end.encode(), (self.open, self.port))

    def frame(self, body: bytes, kind: int = 0x0800, mac: bytes | None = None) -> None:
        for target in (self.peer, b"\xff" * 6):
            self.wire.send(target + (mac or self.mac) + struct.pack("!H", kind) + body)

    def frames(self, target: str) -> None:
        """Past this kernel's own routing, which keeps some packets from ever leaving."""
        for protocol, payload in (
            (17, datagram(self.port, MARK)),
            (1, echo(MARK)),
            (6, syn(GUEST, target, self.port)),
            (47, MARK),
        ):
            self.frame(packet(GUEST, target, protocol, payload))

    def connect(self) -> None:
        for target in self.targets:
            for port in (self.port, 80):
                with socket.socket() as sock:
                    sock.setblocking(False)
                    code = sock.connect_ex((target, port))
                    if code == errno.EINPROGRESS:
                        select.select([], [sock], [], 0.01)
                        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                        with contextlib.suppress(OSError):
                            self.answers.append(f"tcp {sock.getpeername()}")
                    if code == errno.ECONNREFUSED and target not in ITSELF:
                        self.answers.append(f"tcp {target} refused")

    def forge(self) -> None:
        """Also to a server that is open: nobody may send in another's name."""
        for source in self.forged:
            for target in (self.open, *self.targets[:6]):
                body = packet(source, target, 17, datagram(self.port, FORGED))
                with contextlib.suppress(OSError):
                    self.raw.sendto(body, (target, 0))
                self.frame(body)
        body = packet(GUEST, self.open, 17, datagram(self.port, FORGED))
        self.frame(body, mac=b"\x02\0\0\0\0\x07")
        for options in (b"\x01" * 4, b"\x83\x07\x04" + socket.inet_aton(self.targets[0]) + b"\0"):
            self.frame(packet(GUEST, self.open, 17, datagram(self.port, FORGED), options))
        self.frame(struct.pack("!HH", 7, 0x0800) + body, kind=0x8100)

    def ipv6(self) -> None:
        for target in IPV6_TARGETS:
            addresses = socket.inet_pton(socket.AF_INET6, "fe80::21")
            addresses += socket.inet_pton(socket.AF_INET6, target)
            data = datagram(self.port, MARK)
            self.frame(struct.pack("!IHBB", 6 << 28, len(data), 17, 64) + addresses + data, 0x86DD)
            with contextlib.suppress(OSError), self.udp6() as sock:
                sock.sendto(MARK, (target, self.port))

    def udp6(self) -> socket.socket:
        return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)

    def arp(self) -> None:
        """Claims the gateway's and the others' addresses, from this and from another MAC."""
        for claimed in (GATEWAY, *self.forged):
            for mac in (self.mac, b"\x02\0\0\0\0\x07"):
                for kind in (1, 2):
                    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, kind) + mac
                    body += socket.inet_aton(claimed) + self.peer + socket.inet_aton(GATEWAY)
                    self.frame(body, 0x0806, mac)


def main() -> None:
    attack = Attack(json.loads(sys.argv[1]))
    attack.run()
    print(json.dumps(sorted(set(attack.answers))))


main()
