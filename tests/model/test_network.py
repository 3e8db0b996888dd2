"""Network policies: what is accepted, and what stays closed."""

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.model.network import (
    MAX_RANGES,
    PRIVATE,
    SPECIAL,
    InvalidPolicy,
    NetworkPolicy,
    closed_to_all,
)

SLOTS = IPv4Network("10.231.0.0/16")

networks = st.builds(
    lambda number, prefix: IPv4Network((number, prefix), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(4, 32),
)


def parse(*allow: str) -> NetworkPolicy:
    return NetworkPolicy.parse(internet=True, allow=allow, deny=())


def test_ranges_and_addresses() -> None:
    policy = NetworkPolicy.parse(
        internet=False, allow=("203.0.113.0/24", "203.0.113.7"), deny=("0.0.0.0/0",)
    )
    assert policy == NetworkPolicy(
        internet=False,
        allow=(IPv4Network("203.0.113.0/24"), IPv4Network("203.0.113.7/32")),
        deny=(IPv4Network("0.0.0.0/0"),),
    )


def test_each_range_is_kept_once() -> None:
    assert parse("8.8.8.8", "1.1.1.1", "8.8.8.8/32").allow == parse("8.8.8.8", "1.1.1.1").allow


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("2001:db8::/32", "allow.1: sandboxes have IPv4 only"),
        ("::1", "IPv4 only"),
        ("203.0.113.7/24", "allow.1: has bits set behind its prefix; write 203.0.113.0/24"),
        ("203.0.113.0/33", "is not an IPv4 range"),
        ("256.0.0.1", "is not an IPv4 range"),
        ("010.0.0.1", "is not an IPv4 range"),
        ("203.0.113.0/255.255.255.0", "such as 203.0.113.0/24"),
        ("203.0.113.0/24 ", "such as"),
        ("٣.0.0.1", "such as"),
        ("1.2.3", "such as"),
        ("203.0.113.7:80", "IPv4 only"),
        ("example.com/24", "such as"),
        ("localhost", "allow.1: a name has two parts at least"),
        ("*.com", "two parts at least"),
        ("*", "such as 203.0.113.0/24"),
        ("*.*.example.com", "must be a name such as example.com"),
        ("a.*.example.com", "must be a name"),
        ("*example.com", "must be a name"),
        ("example..com", "must be a name"),
        ("-x.example.com", "must be a name"),
        ("example.com.", "such as"),
        ("ex ample.com", "must be a name"),
        ("user@example.com", "must be a name"),
        ("example.0x7f", "must be a name"),
        (f"{'x' * 64}.example.com", "must be a name"),
        (f"{'x.' * 126}example", "must be a name"),
        ("\N{SNOWMAN}\N{ZERO WIDTH JOINER}.com", "must be a name"),
        ("", "such as"),
        ("/", "such as"),
    ],
)
def test_what_is_no_range_is_named(text: str, problem: str) -> None:
    with pytest.raises(InvalidPolicy, match=problem):
        parse("8.8.8.8", text)


def test_names_are_kept_in_ascii_and_once() -> None:
    policy = parse(
        "Example.COM", "8.8.8.8", "example.com", "*.b\u00fccher.example", "_x.a-b.example"
    )
    assert policy.names == ("example.com", "*.xn--bcher-kva.example", "_x.a-b.example")
    assert policy.allow == parse("8.8.8.8").allow


def test_names_are_only_allowed() -> None:
    with pytest.raises(InvalidPolicy, match=r"deny\.0: must be an IPv4 range"):
        NetworkPolicy.parse(internet=True, allow=(), deny=("example.com",))


def test_the_number_of_ranges_is_bounded() -> None:
    many = [f"8.8.{number}.0/24" for number in range(MAX_RANGES + 1)]
    assert len(parse(*many[:-1]).allow) == MAX_RANGES
    with pytest.raises(InvalidPolicy, match="allow: at most 128"):
        parse(*many[:-1], "example.com")
    with pytest.raises(InvalidPolicy, match="deny: at most 128"):
        NetworkPolicy.parse(internet=True, allow=(), deny=many)


@pytest.mark.parametrize("closed", [*map(str, SPECIAL), "10.231.0.7", "169.254.169.254"])
def test_closed_ranges_cannot_be_allowed(closed: str) -> None:
    with pytest.raises(InvalidPolicy, match=r"allow\.1: .* closed to every sandbox"):
        parse("8.8.8.8", closed).require_open(closed_to_all(SLOTS))


def test_ranges_that_hold_a_closed_one_cannot_be_allowed() -> None:
    with pytest.raises(InvalidPolicy, match="holds addresses that are closed"):
        parse("0.0.0.0/0").require_open(closed_to_all(SLOTS))


def test_what_the_operator_opens_can_be_allowed() -> None:
    closed = closed_to_all(SLOTS, [IPv4Network("192.168.4.0/22"), IPv4Network("10.0.0.0/8")])
    parse("192.168.4.0/24", "10.1.2.3", "192.168.7.255").require_open(closed)
    for text in ("192.168.0.0/16", "192.168.8.1", "10.231.4.4", "10.0.0.0/8", "169.254.169.254"):
        with pytest.raises(InvalidPolicy):
            parse(text).require_open(closed)


@given(st.lists(networks, max_size=4), st.integers(0, 2**32 - 1))
def test_closed_is_what_is_special_and_not_allowable(holes: list[IPv4Network], number: int) -> None:
    address = IPv4Address(number)
    closed = closed_to_all(SLOTS, holes)
    special = any(address in each for each in SPECIAL)
    expected = address in SLOTS or (special and not any(address in each for each in holes))
    assert any(address in each for each in closed) == expected


def test_private_ranges_are_special_ones() -> None:
    assert all(any(each.subnet_of(special) for special in SPECIAL) for each in PRIVATE)
