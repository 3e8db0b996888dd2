"""Which headers pass from a client to a guest and back."""

import pytest

from wrenn_sandbox.edge.head import BadAnswer, Fields, Origin, answer_fields, request_head

_OWN = Origin("192.0.2.1", "https", own=True)
_SHARED = Origin("192.0.2.1", "https", own=False)
_PATH = Origin("192.0.2.1", "https", own=False, prefix="/v1/sandboxes/sb-x/ports/80")


def _lines(fields: Fields, origin: Origin = _OWN, upgrade: bytes | None = None) -> list[bytes]:
    head = request_head("GET", b"/", fields, origin, upgrade=upgrade)
    assert head.endswith(b"\r\n\r\n")
    return head[:-4].split(b"\r\n")


def test_a_guest_is_told_who_asks_and_under_which_name() -> None:
    lies: Fields = [
        (b"host", b"3000-sb-x.localhost"),
        (b"x-forwarded-for", b"10.0.0.1"),
        (b"x-forwarded-host", b"elsewhere"),
        (b"forwarded", b"for=10.0.0.1"),
        (b"x-real-ip", b"10.0.0.1"),
    ]
    assert _lines(lies) == [
        b"GET / HTTP/1.1",
        b"host: 3000-sb-x.localhost",
        b"x-forwarded-for: 192.0.2.1",
        b"x-forwarded-proto: https",
        b"x-forwarded-host: 3000-sb-x.localhost",
        b"connection: close",
    ]


def test_what_is_for_one_hop_goes_no_further() -> None:
    fields: Fields = [
        (b"host", b"a"),
        (b"connection", b"keep-alive, X-Secret"),
        (b"x-secret", b"1"),
        (b"te", b"trailers"),
        (b"upgrade", b"h2c"),
        (b"proxy-authorization", b"Basic x"),
        (b"x-kept", b"1"),
    ]
    lines = _lines(fields)
    assert b"x-kept: 1" in lines
    assert b"connection: close" in lines
    for name in (b"x-secret", b"te", b"upgrade", b"proxy-authorization", b"keep-alive"):
        assert not any(line.startswith(name + b":") for line in lines)


def test_nobody_can_name_the_length_of_a_body_as_one_of_a_hop() -> None:
    fields: Fields = [
        (b"host", b"a"),
        (b"connection", b"content-length"),
        (b"content-length", b"5"),
    ]
    assert b"content-length: 5" in _lines(fields)


def test_an_upgrade_is_asked_for_anew() -> None:
    fields: Fields = [(b"host", b"a"), (b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    assert _lines(fields, upgrade=b"websocket")[-2:] == [
        b"connection: Upgrade",
        b"upgrade: websocket",
    ]


@pytest.mark.parametrize(
    ("origin", "passes"),
    [
        (_OWN, {b"Basic dTo=", b"Bearer x", b"a=b", b"of the program"}),
        (_SHARED, {b"Basic dTo="}),
        (_PATH, set()),
    ],
)
def test_credentials_of_ours_reach_no_guest(origin: Origin, passes: set[bytes]) -> None:
    for name, value in (
        (b"authorization", b"Basic dTo="),
        (b"authorization", b"Bearer x"),
        (b"authorization", b"Bearer wrn_0"),
        (b"x-api-key", b"of the program"),
        (b"x-api-key", b"wrn_0"),
        (b"x-api-key", b"e2b_0"),
        (b"cookie", b"a=b"),
    ):
        lines = _lines([(b"host", b"a"), (name, value)], origin)
        assert (b"%b: %b" % (name, value) in lines) is (value in passes)
    for name in (b"e2b-traffic-access-token", b"e2b-sandbox-id", b"e2b-sandbox-port"):
        assert not any(b"secret" in each for each in _lines([(name, b"secret")], origin))


def test_our_own_cookie_is_taken_out_of_the_others() -> None:
    fields: Fields = [(b"cookie", b"a=b; oauth_state=secret; c=d")]
    assert b"cookie: a=b; c=d" in _lines(fields)


def test_a_guests_cookie_is_for_its_own_host_alone() -> None:
    fields: Fields = [(b"set-cookie", b"a=b; Path=/; domain=.localhost; Secure")]
    kept = answer_fields(fields, 200, own_origin=True)
    assert kept == [(b"set-cookie", b"a=b; Path=/; Secure")]
    assert (b"set-cookie", b"a=b") not in answer_fields(fields, 200, own_origin=False)


def test_an_answer_on_our_origin_cannot_do_anything_there() -> None:
    fields: Fields = [
        (b"content-type", b"text/html"),
        (b"set-cookie", b"a=b"),
        (b"clear-site-data", b'"*"'),
        (b"service-worker-allowed", b"/"),
        (b"content-security-policy", b"default-src *"),
        (b"access-control-allow-origin", b"*"),
        (b"cache-control", b"public"),
        (b"strict-transport-security", b"max-age=1"),
    ]
    kept = dict(answer_fields(fields, 200, own_origin=False))
    assert kept.pop(b"content-type") == b"text/html"
    assert b"sandbox" in kept.pop(b"content-security-policy")
    assert kept == {
        b"x-content-type-options": b"nosniff",
        b"x-frame-options": b"DENY",
        b"referrer-policy": b"no-referrer",
        b"cache-control": b"no-store",
    }
    own = answer_fields(fields, 200, own_origin=True)
    assert [name for name, _ in own] == [name for name, _ in fields], "its own origin is its own"


def test_an_answer_without_a_body_has_no_length() -> None:
    for status in (101, 204, 304):
        assert answer_fields([(b"content-length", b"5")], status, own_origin=True) == []


@pytest.mark.parametrize("field", [(b"a b", b"x"), (b"", b"x"), (b"a", b"x\x01y"), (b"a", b"\x7f")])
def test_a_header_that_is_none_is_refused(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(BadAnswer):
        answer_fields([field], 200, own_origin=True)
