"""The name in a ClientHello, whatever else a client sends."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.host.egress.hello import LIMIT, ClientHello, NoHello
from wrenn_sandbox.host.egress.names import covers, known


def hello(name: str | None, protocols: tuple[str, ...] = ()) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(protocols)
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("name", ["example.com", "a.b.example.com", None])
def test_the_name_is_read_and_nothing_is_lost(name: str | None) -> None:
    data = hello(name, ("h2", "http/1.1"))
    whole = ClientHello()
    assert whole.take(data)
    assert (whole.name, whole.data) == (name, data)
    assert whole.alert[:1] == b"\x15"
    parts = ClientHello()
    taken = [parts.take(data[number : number + 1]) for number in range(len(data))]
    assert taken == [False] * (len(data) - 1) + [True]
    assert (parts.name, parts.data) == (name, data)


def test_what_follows_a_hello_is_kept() -> None:
    reading, data = ClientHello(), hello("example.com") + b"early"
    assert reading.take(data)
    assert reading.data == data


def test_a_hello_without_an_end_is_refused() -> None:
    head = b"\x16\x03\x01\x40\x00\x01\x00\xff\xff"
    reading = ClientHello()
    assert not reading.take(head)
    with pytest.raises(NoHello):
        reading.take(bytes(LIMIT))
    reading = ClientHello()
    assert not reading.take(hello("example.com")[:40])
    with pytest.raises(NoHello):
        reading.take(b"")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # names not ASCII
@given(st.binary(min_size=1, max_size=200), st.integers(0, 250))
def test_anything_else_names_nobody_else(noise: bytes, at: int) -> None:
    """Bytes that were changed on the way are a hello or none, and no other failure."""
    data = hello("example.com")
    for sent in (noise, data[:at] + noise + data[at + len(noise) :]):
        reading = ClientHello()
        try:
            reading.take(sent)
            reading.take(b"")
        except NoHello:
            continue


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Example.COM.", "example.com"),
        ("a_b.example.com", "a_b.example.com"),
        ("203.0.113.7", "203.0.113.7"),
        ("localhost", None),
        ("example.com..", None),
        ("[::1]", None),
        ("exa mple.com", None),
        ("example.com\n", None),
        ("ex\u00e4mple.com", None),
        ("\u212a.example.com", None),
        ("x." * 127 + "xx", None),
    ],
)
def test_names_as_guests_say_them(text: str, name: str | None) -> None:
    assert known(text) == name


def test_wildcards_cover_what_is_below_and_nothing_beside() -> None:
    names = {"example.com", "*.example.org"}
    assert [each for each in _ASKED if covers(names, each)] == [
        "example.com",
        "a.example.org",
        "a.b.example.org",
    ]


_ASKED = (
    "example.com",
    "a.example.com",
    "notexample.com",
    "example.org",
    "a.example.org",
    "a.b.example.org",
    "aexample.org",
    "example.org.evil.com",
    "com",
)
