"""Whom a request comes from, when it says that it was forwarded."""

from ipaddress import ip_network

import pytest
from starlette.types import Message, Receive, Scope, Send

from wrenn_sandbox.control.api.forwarded import (
    Forwarded,
    TrustedProxies,
    group_of,
    parse_address,
)

_TRUSTED = TrustedProxies(map(ip_network, ("10.0.0.0/8", "192.0.2.7/32", "2001:db8:f::/48")))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (" 192.0.2.1\t", "192.0.2.1"),
        ("192.0.2.1:8080", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:1", "192.0.2.1"),
        *(
            (bad, None)
            for bad in (
                "",
                "unknown",
                "_hidden",
                "localhost",
                "192.0.2",
                "192.0.2.256",
                "192.0.2.01",
                "192.0.2.1:",
                "192.0.2.1:x",
                "192.0.2.1:70000",
                "192.0.2.1:" + "9" * 5000,
                "192.0.2.1/32",
                "3221225985",
                "0x7f000001",
                "[192.0.2.1",
                "2001:db8::1]",
                "[2001:db8::1]443",
                "[2001:db8::1]:",
                "fe80::1%eth0",
                "[",
                ":",
                "for=192.0.2.1",
                '"192.0.2.1"',
                "١٩٢.0.2.1",
                "192.0.2.1\0",
                "192.0.2.1 192.0.2.2",
                "a" * 100_000,
            )
        ),
    ],
)
def test_addresses_as_proxies_write_them(text: str, address: str | None) -> None:
    parsed = parse_address(text)
    assert (None if parsed is None else str(parsed)) == address


@pytest.mark.parametrize(
    ("peer", "values", "client"),
    [
        # nobody else is believed
        ("198.51.100.1", ["192.0.2.1"], "198.51.100.1"),
        ("11.0.0.1", ["10.0.0.1"], "11.0.0.1"),
        # one proxy: it has written the last address, whatever the client had sent
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["127.0.0.1, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["127.0.0.1", "10.9.9.9", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["nonsense, ,,, 198.51.100.1:5555"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1", "[2001:db8::5]:443"], "2001:db8::5"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        # several
        ("10.0.0.1", ["203.0.113.5, 198.51.100.1, 192.0.2.7, 10.0.0.2"], "198.51.100.1"),
        ("2001:db8:f::1", ["203.0.113.5, 2001:db8:f:1::2"], "203.0.113.5"),
        ("10.0.0.1", ["10.0.0.3,10.0.0.2"], "10.0.0.3"),
        # what cannot be read ends the chain
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.2,"], "10.0.0.1"),
        # and so does its length
        ("10.0.0.1", ["203.0.113.5," + "10.0.0.2," * 5000 + "10.0.0.3"], "10.0.0.2"),
        ("10.0.0.1", ["203.0.113.5"] + ["10.0.0.2"] * 5000, "10.0.0.2"),
        ("10.0.0.1", ["x," * 500_000 + "198.51.100.1"], "198.51.100.1"),
        ("not an address", ["198.51.100.1"], "not an address"),
    ],
)
def test_the_client_behind_a_chain(peer: str, values: list[str], client: str) -> None:
    assert _TRUSTED.client_of(peer, values) == client


def test_nobody_is_trusted_by_default() -> None:
    nobody = TrustedProxies()
    assert "127.0.0.1" not in nobody
    assert nobody.client_of("127.0.0.1", ["198.51.100.1"]) == "127.0.0.1"


def test_whom_limits_count() -> None:
    assert group_of("192.0.2.1") == "192.0.2.1"
    assert group_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert group_of("2001:db8::1") == group_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert group_of("2001:db8:0:1::1") != group_of("2001:db8::1")
    assert group_of("unknown") == "unknown"


async def _seen(scope: Scope) -> Scope:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    await Forwarded(app, trusted=_TRUSTED)(scope, receive, send)
    (found,) = seen
    return found


@pytest.mark.parametrize(
    ("scheme", "protos", "expected"),
    [
        ("http", [b"https"], "https"),
        ("http", [b"HTTPS "], "https"),
        ("http", [b"http"], "http"),
        ("https", [b"http"], "http"),
        ("ws", [b"https"], "wss"),
        ("ws", [b"wss"], "wss"),
        ("wss", [b"http"], "ws"),
        ("http", [b"https, http"], "http"),
        ("http", [b"http", b"https"], "https"),
        ("http", [b"javascript"], "http"),
        ("http", [b""], "http"),
        ("http", [b"\xff"], "http"),
        ("http", [], "http"),
    ],
)
async def test_the_scheme_that_the_proxy_speaks(
    scheme: str, protos: list[bytes], expected: str
) -> None:
    headers = [(b"x-forwarded-proto", each) for each in protos]
    headers.append((b"x-forwarded-for", b"198.51.100.1"))
    kind = "websocket" if scheme.startswith("ws") else "http"
    scope = {"type": kind, "scheme": scheme, "client": ("10.0.0.1", 5), "headers": headers}
    seen = await _seen(scope)
    assert (seen["scheme"], seen["client"]) == (expected, ("198.51.100.1", 0))


async def test_headers_of_others_change_nothing() -> None:
    headers = [(b"x-forwarded-proto", b"https"), (b"x-forwarded-for", b"10.0.0.9")]
    scope = {"type": "http", "scheme": "http", "client": ("198.51.100.1", 5), "headers": headers}
    assert await _seen(scope) is scope
    assert await _seen({**scope, "client": None}) == {**scope, "client": None}
    assert (await _seen({"type": "lifespan"}))["type"] == "lifespan"
