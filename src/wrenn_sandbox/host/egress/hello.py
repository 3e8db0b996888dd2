"""The name in the ClientHello of a TLS connection, as OpenSSL reads it. Nothing is decrypted."""

import ssl
from typing import Final

LIMIT: Final = 32 * 1024
"""Bytes that a ClientHello may have; those of today have less than 2 KiB."""


class NoHello(Exception):
    """What a client sends does not begin a TLS connection."""


class _Reading(ssl.SSLObject):
    complete = False
    name: str | None = None


def _read(reading: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int:
    assert isinstance(reading, _Reading)
    reading.complete, reading.name = True, name
    return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME


_context: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
_context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
_context.sslobject_class = _Reading
_context.sni_callback = _read


class ClientHello:
    """`data` is what was taken so far; `alert` is the answer that refuses the connection."""

    def __init__(self) -> None:
        self.data = b""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        reading = _context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        assert isinstance(reading, _Reading)
        self._reading = reading

    def take(self, data: bytes) -> bool:
        """Whether the ClientHello is complete with these bytes. Raises `NoHello`."""
        self.data += data
        self._incoming.write(data)
        try:
            self._reading.do_handshake()
        except ssl.SSLWantReadError:
            if data and len(self.data) < LIMIT:
                return False
        except ssl.SSLError:
            if self._reading.complete:
                return True
        raise NoHello

    @property
    def name(self) -> str | None:
        """The server's name; None without one."""
        return self._reading.name

    @property
    def alert(self) -> bytes:
        return self._outgoing.read()
