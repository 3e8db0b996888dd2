"""The kernel's table of connections, over netlink: there is a library for it, but no program."""

import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final

from wrenn_sandbox.patience import patience

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nfnetlink_conntrack.h
_NETLINK_NETFILTER: Final = 12
_CONNECTIONS: Final = 1 << 8
_GET: Final = _CONNECTIONS | 1
_DELETE: Final = _CONNECTIONS | 2
_REQUEST: Final = 0x01
_DUMP: Final = 0x300
_ERROR: Final = 2
_DONE: Final = 3
_NESTED: Final = 0x8000
_TUPLE_ORIG: Final = 1
_TUPLE_IP: Final = 1
_IP_V4_SRC: Final = 1
_FILTER: Final = 25
_FILTER_ORIG_FLAGS: Final = 1
_FILTER_F_IP_SRC: Final = 1
_TYPE: Final = 0x3FFF
_HEADER: Final = struct.Struct("=IHHII")
_FAMILY: Final = struct.pack("!BBH", socket.AF_INET, 0, 0)
_TIMEOUT_SEC: Final = 10.0
_BUFFER: Final = 1 << 18


def forget_connections(source: IPv4Address) -> int:
    """Remove what the kernel remembers of connections that this address began; how many.

    In the calling thread's namespace. Raises OSError.
    """
    count = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(patience(_TIMEOUT_SEC))
        for connection in list(_connections(netlink, source)):
            netlink.send(_message(_DELETE, _REQUEST, _attribute(_TUPLE_ORIG | _NESTED, connection)))
            count += 1
    return count


def _connections(netlink: socket.socket, source: IPv4Address) -> Iterator[bytes]:
    """The tuples of the connections; a kernel before 5.8 lists all there are, hence the check."""
    address = _attribute(_IP_V4_SRC, source.packed)
    wanted = _attribute(_TUPLE_ORIG | _NESTED, _attribute(_TUPLE_IP | _NESTED, address))
    flags = _attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", _FILTER_F_IP_SRC))
    body = wanted + _attribute(_FILTER | _NESTED, flags)
    netlink.send(_message(_GET, _REQUEST | _DUMP, body))
    while True:
        for kind, payload in _messages(netlink.recv(_BUFFER)):
            if kind == _DONE:
                return
            if kind == _ERROR:
                code: int = struct.unpack_from("=i", payload)[0]
                raise OSError(-code, "the kernel does not list connections")
            found = _attributes(payload[len(_FAMILY) :]).get(_TUPLE_ORIG, b"")
            ends = _attributes(_attributes(found).get(_TUPLE_IP, b""))
            if ends.get(_IP_V4_SRC) == source.packed:
                yield found


def _message(kind: int, flags: int, body: bytes) -> bytes:
    length = _HEADER.size + len(_FAMILY) + len(body)
    return _HEADER.pack(length, kind, flags, 0, 0) + _FAMILY + body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _attribute(kind: int, value: bytes) -> bytes:
    padded = value.ljust(_aligned(len(value)), b"\0")
    return struct.pack("=HH", 4 + len(value), kind) + padded


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & _TYPE] = data[4:length]
        data = data[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3
