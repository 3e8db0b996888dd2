"""The way of a new connection: its place, its TLS handshake, its protocol."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from wrenn_sandbox.errors import WrennError

from .connections import Connections, Place
from .http_protocol import HttpProtocol, refusal
from .tls import Certificate


@dataclass(frozen=True)
class Gate:
    """What all new connections pass. `protocol` speaks on one that has a place."""

    connections: Connections
    certificate: Certificate | None
    handshake_seconds: float
    protocol: Callable[[Place], HttpProtocol]
    handshakes: set["asyncio.Task[None]"]


class Entry(asyncio.Protocol):
    """A connection until it can be spoken on. One without a place is told so, and closed."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        try:
            place = self._gate.connections.admit(str(peer[0]) if peer else "unknown")
        except WrennError as error:
            if self._gate.certificate is None:
                transport.write(refusal(error, "http", ()))
                transport.close()
            else:
                transport.abort()
            return
        if self._gate.certificate is None:
            self._gate.protocol(place).take(transport)
            return
        task = asyncio.get_running_loop().create_task(
            self._shake_hands(transport, self._gate.certificate, place)
        )
        self._gate.handshakes.add(task)
        task.add_done_callback(self._gate.handshakes.discard)

    async def _shake_hands(
        self, transport: asyncio.Transport, certificate: Certificate, place: Place
    ) -> None:
        early = _Early()
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(
                transport,
                early,
                certificate.context,
                server_side=True,
                ssl_handshake_timeout=self._gate.handshake_seconds,
            )
            if secure is None or early.lost:
                place.release()
                return
        except OSError:
            place.release()
            transport.abort()
            return
        except BaseException:
            place.release()
            transport.abort()
            raise
        protocol = self._gate.protocol(place)
        protocol.take(secure)
        if early.data:
            protocol.data_received(bytes(early.data))


class _Early(asyncio.Protocol):
    """Keeps what comes with the last message of a handshake."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
