"""The server's certificate: read at the start, and again when it changes."""

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import structlog

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.settings import EdgeSettings

_log = structlog.get_logger(__name__)

WATCH_SECONDS: Final = 10.0
_OTHERS: Final = 0o007
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which the module `ssl` does not name."""
_MISMATCH: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""What OpenSSL says of a key that belongs to another certificate."""


class Certificate:
    """Gives new connections the newest certificate that was acceptable; `context` holds it.

    A context is made anew for each certificate: one that is given a second certificate of another
    kind of key goes on using both.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert = cert
        self._key = key
        self._seen = self._contents()
        self._changed = asyncio.Event()
        self.reads = 0
        """How often the files have been looked at again."""
        self.context = self._load()
        self.expires = self._expiry()
        """When the certificate of `context` is no longer valid, in seconds since the epoch.

        None where that is not known.
        """

    @classmethod
    def of(cls, settings: EdgeSettings) -> Self | None:
        """None without certificate settings; `InvalidRequest` where they cannot be used."""
        cert, key = settings.tls_cert, settings.tls_key
        if cert is None and key is None:
            return None
        if cert is None or key is None:
            missing = "WRENN_TLS_CERT" if cert is None else "WRENN_TLS_KEY"
            raise InvalidRequest(f"{missing} is not set: TLS needs certificate and key")
        return cls(cert, key)

    def renew(self) -> None:
        """Have the files read again now."""
        self._seen = []
        self._changed.set()

    async def watch(self) -> None:
        """Take new certificates as they come; one that is not acceptable changes nothing."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_SECONDS)
            self._changed.clear()
            await asyncio.to_thread(self._read_again)
            self.reads += 1

    def _read_again(self) -> None:
        try:
            contents = self._contents()
            if contents == self._seen:
                return
            self.context = self._load()
            self.expires = self._expiry()
        except (InvalidRequest, OSError) as error:
            _log.error("the certificate stays the old one", reason=str(error))
            return
        self._seen = contents
        _log.info("certificate read")

    def _contents(self) -> list[bytes]:
        """A digest of each file."""
        contents = []
        for name, path in (("WRENN_TLS_CERT", self._cert), ("WRENN_TLS_KEY", self._key)):
            try:
                contents.append(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise InvalidRequest(f"{name}: {path}: {error.strerror}") from None
        return contents

    def _load(self) -> ssl.SSLContext:
        if self._key.stat().st_mode & _OTHERS:
            _log.warning(
                "others may use the key of the certificate; chmod 600", path=str(self._key)
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except _PasswordNeeded:
            raise InvalidRequest(f"WRENN_TLS_KEY: {self._key} has a password") from None
        except ssl.SSLError as error:
            raise InvalidRequest(self._explain(error)) from None
        return context

    def _expiry(self) -> float | None:
        """Asked of a client that is shown the certificate: Python reads none otherwise."""
        try:
            found = self._shown()
        except OSError as error:
            _log.warning("when the certificate expires is not known", reason=str(error))
            return None
        return None if found is None else float(ssl.cert_time_to_seconds(str(found["notAfter"])))

    def _shown(self) -> Mapping[str, object] | None:
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
        client.load_verify_locations(self._cert)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        asked = self.context.wrap_bio(to_server, to_client, server_side=True)
        asking = client.wrap_bio(to_client, to_server)
        for side in (asking, asked, asking):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        return asking.getpeercert()

    def _explain(self, error: ssl.SSLError) -> str:
        if error.reason in _MISMATCH:
            return f"WRENN_TLS_KEY: {self._key} is not the key of {self._cert}"
        reason = (error.reason or "not PEM").replace("_", " ").lower()
        return f"WRENN_TLS_CERT, WRENN_TLS_KEY: {self._cert}, {self._key}: {reason}"


class _PasswordNeeded(Exception):
    pass


def _no_password() -> str:
    raise _PasswordNeeded
