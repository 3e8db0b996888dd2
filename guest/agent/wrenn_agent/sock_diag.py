"""TCP sockets of this VM, whoever has them, as the kernel lists them: sock_diag(7)."""

from __future__ import annotations

import _socket as socket
import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_AF_NETLINK, _NETLINK_SOCK_DIAG = 16, 4
_FIND, _DESTROY = 20, 21
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_LISTEN = 1 << 10
_OVER = 1 << 6 | 1 << 7
"""TIME_WAIT and CLOSE: nobody has them any more."""

_CONNECTED = 0xFFF & ~(_LISTEN | _OVER)
_HEADER = struct.Struct("=IHHII")
_REQUEST_BODY = struct.Struct("=BBBBI48s")
_ENDS = struct.Struct("!Hxx16s16s")
_ANY = bytes(16)
_MAPPED = bytes(10) + b"\xff\xff"
_BUFFER = 64 * 1024
_SECONDS = 5.0


def is_listened_on(address: str, port: int) -> bool:
    """Whether a program listens on `port` of this IPv4 address, or of all.

    Raises OSError where this kernel does not tell.
    """
    with _Kernel() as kernel:
        for family in _FAMILIES:
            for here, local, _, _ in kernel.sockets(family, _LISTEN):
                if here == port and (local == _ANY or _is(local, address)):
                    return True
    return False


def can_end_connections() -> bool:
    """Whether this kernel lets connections be ended; raises OSError."""
    with _Kernel() as kernel:
        return kernel.destroy(socket.AF_INET, bytes(48)) == errno.ENOENT


def end_connections(peer: str, kept_port: int) -> None:
    """Break all connections with this IPv4 address but those to `kept_port`, if it can be done.

    Programs find them reset. Raises OSError where this kernel does not tell of them.
    """
    with _Kernel() as kernel:
        for family in _FAMILIES:
            for here, _, remote, identity in list(kernel.sockets(family, _CONNECTED)):
                if here != kept_port and _is(remote, peer):
                    kernel.destroy(family, identity)


def _is(address: bytes, ipv4: str) -> bool:
    packed = socket.inet_aton(ipv4)
    return address in (packed + bytes(12), _MAPPED + packed)


class _Kernel:
    def __enter__(self) -> _Kernel:
        self._sock = socket.socket(_AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)
        self._sock.settimeout(_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def sockets(self, family: int, states: int) -> Iterator[tuple[int, bytes, bytes, bytes]]:
        """Its port here, the addresses here and there, and what names the socket."""
        self._send(_FIND, _DUMP, family, states, bytes(48))
        while True:
            for kind, body in self._messages():
                if kind == _DONE:
                    return
                identity = body[4:52]
                yield (*_ENDS.unpack_from(identity), identity)

    def destroy(self, family: int, identity: bytes) -> int:
        """Break a connection; what the kernel says, as an errno, ENOENT where there is none."""
        self._send(_DESTROY, _ACK, family, 0xFFF, identity)
        try:
            list(self._messages())
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _send(self, kind: int, flags: int, family: int, states: int, identity: bytes) -> None:
        body = _REQUEST_BODY.pack(family, socket.IPPROTO_TCP, 0, 0, states, identity)
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 0, 0) + body)

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        data = self._sock.recv(_BUFFER)
        while data:
            size, kind, _, _, _ = _HEADER.unpack_from(data)
            body = data[_HEADER.size : size]
            if kind == _ERROR:
                number = -int.from_bytes(body[:4], "little", signed=True)
                if number:
                    raise OSError(number, os.strerror(number))
            yield kind, body
            data = data[(size + 3) & ~3 :]
