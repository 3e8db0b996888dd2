"""Who asks when proxies stand in between: their word counts only where they are trusted.

uvicorn's `ProxyHeadersMiddleware` does not do: it takes text that is no address for the client,
does not know a proxy by its IPv4-mapped address, ignores lists in `X-Forwarded-Proto`, and looks
at any number of hops (80 ms of the event loop for a chain of 6,000 proxies).
"""

import ipaddress
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

_MOST_HOPS: Final = 32
"""Entries of a chain that are looked at, from its end."""

_SECURE: Final = {"http": "https", "ws": "wss"}
_PLAIN: Final = {"https": "http", "wss": "ws"}


def parse_address(text: str) -> Address | None:
    """An address as proxies write it: bare, with a port, or `[IPv6]:port`; None for anything else.

    An IPv4 address in IPv6 clothes (`::ffff:192.0.2.1`) is that IPv4 address.
    """
    text = text.strip()
    if text.startswith("["):
        text, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not _is_port(rest)):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(":" + port):
            return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return None
        return address.ipv4_mapped or address
    return address


def _is_port(text: str) -> bool:
    digits = text[1:]
    return text[0] == ":" and digits.isascii() and digits.isdigit() and int(digits[:6]) <= 65535


def group_of(address: str) -> str:
    """Whom limits count: an IPv4 address, or the /64 that one subscriber has with IPv6."""
    parsed = parse_address(address)
    if isinstance(parsed, IPv6Address):
        return str(IPv6Network((parsed, 64), strict=False))
    return address if parsed is None else str(parsed)


class TrustedProxies:
    """The networks whose forwarding headers count."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = tuple(networks)

    def __contains__(self, address: str | Address) -> bool:
        if not self._networks:
            return False
        parsed = parse_address(address) if isinstance(address, str) else address
        return parsed is not None and any(
            parsed.version == network.version and parsed in network for network in self._networks
        )

    def client_of(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The address that stands at the far end of the trusted part of the chain.

        `forwarded_for` holds the values of `X-Forwarded-For` in their order. The chain is read from
        its end, where the nearest proxy has written; the first address that is not trusted is the
        client. What cannot be read ends the chain: the hop that passed it on is the client.
        """
        client = peer
        hops = ",".join(forwarded_for).rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]
        for text in reversed(hops):
            if client not in self:
                break
            address = parse_address(text)
            if address is None:
                break
            client = str(address)
        return client


class Forwarded:
    """Puts the client's address and scheme in place of a trusted proxy's own.

    `X-Forwarded-For` names the client, `X-Forwarded-Proto` its scheme: `https` or `http`, of
    several the last. From anyone else both are ignored, as every other forwarding header always is.
    """

    def __init__(self, app: ASGIApp, *, trusted: TrustedProxies) -> None:
        self._app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            client = scope.get("client")
            if client is not None and client[0] in self._trusted:
                scope = self._as_forwarded(scope, client[0], client[1])
        await self._app(scope, receive, send)

    def _as_forwarded(self, scope: Scope, peer: str, port: int) -> Scope:
        address = self._trusted.client_of(peer, _values(scope, b"x-forwarded-for"))
        scheme = scope["scheme"]
        proto = ",".join(_values(scope, b"x-forwarded-proto")).rpartition(",")[2].strip().lower()
        if proto in ("https", "wss"):
            scheme = _SECURE.get(scheme, scheme)
        elif proto in ("http", "ws"):
            scheme = _PLAIN.get(scheme, scheme)
        client = (peer, port) if address == peer else (address, 0)
        return {**scope, "client": client, "scheme": scheme}


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
