"""URLs, patterns, waits and signatures of webhooks."""

import hashlib
import hmac
from ipaddress import ip_network

import pytest

from wrenn_sandbox.model.events import TYPES, InvalidPattern, check_patterns, matches
from wrenn_sandbox.model.webhooks import InvalidUrl, check_url, delay_after, signature


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://example.com/",
        "https://",
        "https:///path",
        "example.com/hook",
        "http://user:secret@example.com/",
        "http://good.example\\@127.0.0.1/",
        "https://example.com/#fragment",
        "https://example.com/a b",
        "https://example.com/\n",
        "https://example.com:99999/",
        "https://exämple.com/",
        "https://example.com/" + "x" * 2048,
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://[::1",
        "http://[::ffff:127.0.0.1]/",
        "http://[fe80::1%eth0]/",
        "http://169.254.169.254/latest/meta-data",
    ],
)
def test_a_url_that_is_none_to_deliver_to_is_refused(url: str) -> None:
    with pytest.raises(InvalidUrl):
        check_url(url, ())


@pytest.mark.parametrize(
    "url", ["http://example.com", "https://xn--exmple-cua.com:8443/a?b=c", "http://10.1.2.3/"]
)
def test_a_url_to_deliver_to_is_accepted(url: str) -> None:
    check_url(url, (ip_network("10.0.0.0/8"),))


@pytest.mark.parametrize(
    "pattern",
    ["", "sandbox", "*.*", "sandbox.", ".paused", "sandbox.nothing", "sandbox.*.x", "a b"],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidPattern):
        check_patterns(["*", pattern])


def test_patterns_choose_types() -> None:
    check_patterns(TYPES)
    chosen = [each for each in TYPES if matches(["snapshot.*", "sandbox.paused"], each)]
    assert chosen == ["sandbox.paused", "snapshot.created", "snapshot.deleted"]
    assert all(matches(["*"], each) for each in TYPES)


def test_waits_grow_up_to_some_hours() -> None:
    waits = [delay_after(attempt, 0.5).total_seconds() for attempt in range(1, 12)]
    assert waits == [5, 30, 120, 600, 1800, 3600, 7200, 10800, 10800, 10800, 10800]
    assert [delay_after(1, jitter).total_seconds() for jitter in (0, 1)] == [4, 6]


def test_a_signature_is_an_hmac_of_time_and_body() -> None:
    wanted = hmac.new(b"whsec_x", b"1700000000.{}", hashlib.sha256).hexdigest()
    assert signature("whsec_x", 1700000000, b"{}") == f"v1={wanted}"
