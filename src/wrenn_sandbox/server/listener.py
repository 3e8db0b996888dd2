"""The way of a new connection: its place, its TLS handshake, its protocol."""

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import structlog

from wrenn_sandbox.errors import WrennError

from .connections import ConnectionPermit, Connections
from .http_protocol import HttpProtocol, refusal
from .tls import Certificate

_log = structlog.get_logger(__name__)
_PAUSE_SECONDS: Final = 0.5


class Listener:
    """Lets connections in, each with a protocol of its own.

    A connection is counted from the moment it is accepted, so that a client in the middle of its
    handshake, which may take `handshake_seconds`, has its place too. One that gets none is told
    so where no certificate stands in between, and closed.
    """

    def __init__(
        self,
        connections: Connections,
        protocol: Callable[[ConnectionPermit], HttpProtocol],
        certificate: Certificate | None,
        *,
        handshake_seconds: float,
    ) -> None:
        self.connections = connections
        self._protocol = protocol
        self._certificate = certificate
        self._handshake_seconds = handshake_seconds

    async def run(self, listener: socket.socket) -> None:
        """Accept until cancelled, which also ends what has not got through."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    accepted, address = await loop.sock_accept(listener)
                except OSError as error:
                    _log.warning("no connection accepted", reason=error.strerror)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                try:
                    place = self.connections.admit(str(address[0]))
                except WrennError as error:
                    self._turn_away(accepted, error)
                else:
                    tasks.create_task(self._let_in(accepted, place))

    async def _let_in(self, accepted: socket.socket, place: ConnectionPermit) -> None:
        context = None if self._certificate is None else self._certificate.context
        done = False
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._protocol(place),
                accepted,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._handshake_seconds,
            )
            done = True
        except OSError as error:
            _log.debug("no handshake", reason=str(error))
        except Exception:
            _log.exception("connection failed")
        finally:
            if not done:
                place.release()
                accepted.close()

    def _turn_away(self, accepted: socket.socket, error: WrennError) -> None:
        with accepted:
            accepted.setblocking(False)
            if self._certificate is None:
                try:
                    accepted.send(refusal(error, "http", ()))
                except OSError as lost:
                    _log.debug("a refusal was not heard", reason=lost.strerror)
