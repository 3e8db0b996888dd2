"""TLS of a guest's connection, led to the host that its first message names.

It is passed on as it is, unless the sandbox has rules for secrets of that host. Then it ends here,
the requests in it get headers, and the host is called by TLS anew.
"""

import asyncio
import os
import ssl
from collections.abc import Sequence
from typing import Final, Protocol

from . import http
from .connection import Connection, Denied, Unreachable
from .hello import ClientHello, NoHello
from .names import known
from .stream import Stream, TlsStream, pump

PORT: Final = http.TLS_PORT
_HANDSHAKE_SEC: Final = 10.0
_PROTOCOLS: Final = ("http/1.1",)


class Rules:
    """The rules for secrets of one sandbox: headers for hosts, and a certificate in their place."""

    def __init__(self, certificate: str, key: str, headers: Sequence[tuple[str, str, str]]) -> None:
        """The certificate and its key are PEM; headers have the name of the host first."""
        self._headers = headers
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.set_alpn_protocols(_PROTOCOLS)
        with _Readable(certificate) as chain, _Readable(key) as private:
            self.context.load_cert_chain(chain.path, private.path)

    def headers(self, name: str) -> http.Headers:
        """Those of a name, or of the wildcard above it."""
        found = [each[1:] for each in self._headers if each[0] == name]
        return found or [each[1:] for each in self._headers if each[0] == wildcard(name)]


class Sandbox(Protocol):
    """Whose guest it is."""

    rules: Rules | None
    far_context: ssl.SSLContext

    def has_rule(self, name: str) -> bool: ...

    async def dial_past(self, connection: Connection) -> bool: ...


class _Inside:
    """The inside of a guest's TLS for one host."""

    def __init__(
        self, sandbox: Sandbox, connection: Connection, name: str, near: TlsStream
    ) -> None:
        self.name = name
        self.near = near
        self._sandbox = sandbox
        self._connection = connection

    async def dial(self) -> Stream:
        sock = await self._connection.dial(self.name, PORT)
        far = TlsStream(self._connection, sock, self._sandbox.far_context, name=self.name)
        try:
            async with asyncio.timeout(_HANDSHAKE_SEC):
                await far.shake_hands()
        except ssl.SSLCertVerificationError as error:
            why = error.verify_message.rstrip(".")
            raise Unreachable(f"The certificate of {self.name} is not valid: {why}") from error
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"{self.name} does not answer by TLS") from error
        return far

    def headers(self) -> http.Headers:
        rules = self._sandbox.rules
        found = () if rules is None else rules.headers(self.name)
        if not found:
            raise Denied(f"The secret for {self.name} is not there")
        return found


async def serve(sandbox: Sandbox, connection: Connection) -> None:
    """Serve a connection to its end. Raises OSError."""
    hello = ClientHello()
    name = None
    try:
        while not hello.take(await connection.receive(connection.near)):
            pass
        name = known(hello.name or "")
    except NoHello:
        if not hello.data:
            return
    if name is not None and sandbox.has_rule(name):
        await _serve_inside(sandbox, connection, hello, name)
        return
    try:
        past = await sandbox.dial_past(connection)
        if not past and name is not None:
            await connection.dial(name, PORT)
        if connection.far is not None:
            near, far = (Stream(connection, each) for each in (connection.near, connection.far))
            await pump(near, far, from_near=hello.data)
            return
    except (Denied, Unreachable):
        pass
    if alert := hello.alert:
        await connection.send(connection.near, alert)


async def _serve_inside(
    sandbox: Sandbox, connection: Connection, hello: ClientHello, name: str
) -> None:
    if sandbox.rules is None:  # the server has not said yet what the secrets are
        await connection.send(connection.near, hello.alert)
        return
    connection.name = name
    connection.inside = True
    near = TlsStream(connection, connection.near, sandbox.rules.context, data=hello.data)
    await near.shake_hands()
    await http.serve(connection, _Inside(sandbox, connection, name, near))


def wildcard(name: str) -> str:
    """The pattern for what differs from a name in its first label."""
    return "*." + name.partition(".")[2]


def calling(roots: str) -> ssl.SSLContext:
    """Calls hosts whose certificates these authorities vouch for (PEM)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(_PROTOCOLS)
    if roots:
        context.load_verify_locations(cadata=roots)
    return context


class _Readable:
    """A text as a file, for OpenSSL: it is in a pipe, because the process may write no files."""

    def __init__(self, text: str) -> None:
        self._fd, writing = os.pipe()
        with open(writing, "wb") as pipe:
            pipe.write(text.encode())  # less than a pipe holds
        self.path = f"/proc/self/fd/{self._fd}"

    def __enter__(self) -> "_Readable":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
