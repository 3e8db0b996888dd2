"""What a guest is told of a request, and a client of a guest's answer. Pure.

Neither side's hop-by-hop fields reach the other (RFC 9110, section 7.6.1). No API key, token of
private ports or cookie of this platform reaches a guest. Two credentials do where a client sends
them there: `X-Access-Token`, which programs such as the code interpreter ask for themselves, and on
a sandbox's own host a login's `Authorization: Bearer`, which looks like any other.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

from wrenn_sandbox.ids import KEY_PREFIXES

from .address import PORT_HEADER, SANDBOX_HEADER

Fields = list[tuple[bytes, bytes]]
"""Names in lower case."""

TRAFFIC_TOKEN: Final = b"e2b-traffic-access-token"
"""The header in which the token of private ports comes."""

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"expect",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_OURS: Final = frozenset(
    {
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-real-ip",
        TRAFFIC_TOKEN,
        SANDBOX_HEADER,
        PORT_HEADER,
    }
)
_COOKIES: Final = frozenset({b"oauth_state"})
"""Names of cookies that this server sets."""

_OF_THE_ORIGIN: Final = frozenset(
    {
        b"alt-svc",
        b"cache-control",
        b"clear-site-data",
        b"content-security-policy",
        b"content-security-policy-report-only",
        b"document-policy",
        b"expires",
        b"nel",
        b"origin-agent-cluster",
        b"permissions-policy",
        b"pragma",
        b"referrer-policy",
        b"refresh",
        b"report-to",
        b"reporting-endpoints",
        b"service-worker-allowed",
        b"set-cookie",
        b"set-cookie2",
        b"sourcemap",
        b"speculation-rules",
        b"strict-transport-security",
        b"www-authenticate",
        b"x-content-type-options",
        b"x-frame-options",
        b"x-xss-protection",
    }
)
"""What an answer says to browsers about its origin, or could do to what they keep of it."""

_HARMLESS: Final = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_A_KEY: Final = re.compile(
    rb"\s*(bearer\s+)?(%b)" % "|".join(KEY_PREFIXES).encode("ascii"), re.IGNORECASE
)
_CONTROLS: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class BadAnswer(Exception):
    """A guest said something that is not HTTP/1.1, or not within its bounds."""


@dataclass(frozen=True, slots=True)
class Origin:
    """From where and under which name a request came; `prefix` is what was cut off its path."""

    client: str
    scheme: str
    own: bool
    prefix: str = ""


def client_of(scope: Scope) -> str:
    """The address that a request comes from, through trusted proxies."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def request_head(
    method: str,
    target: bytes,
    fields: Iterable[tuple[bytes, bytes]],
    origin: Origin,
    *,
    upgrade: bytes | None = None,
    keep: bool = False,
    extra: Iterable[tuple[bytes, bytes]] = (),
) -> bytes:
    """The head of the request that a guest gets, with `extra` instead of what the client sent.

    A body keeps its length, or is sent in chunks. `keep` asks for the connection to stay open.
    """
    fields = list(fields)
    extra = list(extra)
    left_out = _HOP_BY_HOP | _OURS | _named(fields) | {name for name, _ in extra}
    kept = [each for each in fields if each[0] not in left_out and _may_pass(each, origin)]
    given = dict(fields)
    if b"transfer-encoding" in given:
        kept = [each for each in kept if each[0] != b"content-length"]
        kept.append((b"transfer-encoding", b"chunked"))
    kept += _forwarded(given.get(b"host", b""), origin)
    kept += extra
    if upgrade is None:
        kept.append((b"connection", b"keep-alive" if keep else b"close"))
    else:
        kept += [(b"connection", b"Upgrade"), (b"upgrade", upgrade)]
    lines = b"".join(b"%b: %b\r\n" % (name, _without_ours(name, value)) for name, value in kept)
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode("ascii"), target, lines)


def answer_fields(fields: Fields, status: int, *, own_origin: bool) -> Fields:
    """What a client is told of an answer's head; raises `BadAnswer`.

    A cookie is for the guest's own host alone, whatever domain it names. On an origin that is not
    the guest's, nothing of the answer can run, be kept or change what a browser has of it.
    """
    for name, value in fields:
        if not _TOKEN.fullmatch(name) or _CONTROLS.search(value):
            raise BadAnswer("a header that is none")
    left_out: Collection[bytes] = _HOP_BY_HOP | _named(fields) | {b"date"}
    if not own_origin:
        left_out = {*left_out, *_OF_THE_ORIGIN}
    if status in (204, 304) or status < 200:
        left_out = {*left_out, b"content-length"}
    kept = [
        (name, _host_only(value) if name == b"set-cookie" else value)
        for name, value in fields
        if name not in left_out
        and (own_origin or not name.startswith((b"access-control-", b"cross-origin-")))
    ]
    return kept if own_origin else [*kept, *_HARMLESS]


def _named(fields: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """The fields that `Connection` says are for one hop; never those that frame a message."""
    values = [value for name, value in fields if name == b"connection"]
    names = {each.strip().lower() for each in b",".join(values).split(b",")}
    return names - {b"host", b"content-length", b"transfer-encoding", b"cookie", b"authorization"}


def _may_pass(field: tuple[bytes, bytes], origin: Origin) -> bool:
    """On our own origin `Authorization` and cookies may be ours: only a guest's user name may pass,
    and nothing under a path, which needs credentials of ours. On a guest's own origin they are the
    guest's, but for what looks like a key of ours."""
    name, value = field
    if name == b"x-api-key" and not origin.own:
        return False
    if name in (b"x-api-key", b"authorization") and _A_KEY.match(value):
        return False
    if origin.own:
        return True
    if name == b"authorization":
        return not origin.prefix and value[:6].lower() == b"basic "
    return name != b"cookie"


def _without_ours(name: bytes, value: bytes) -> bytes:
    if name != b"cookie":
        return value
    cookies = [each.strip() for each in value.split(b";")]
    return b"; ".join(each for each in cookies if each.partition(b"=")[0] not in _COOKIES)


def _forwarded(host: bytes, origin: Origin) -> Fields:
    fields = [
        (b"x-forwarded-for", origin.client.encode("latin-1", "replace")),
        (b"x-forwarded-proto", origin.scheme.encode("ascii")),
        (b"x-forwarded-host", host),
    ]
    if origin.prefix:
        fields.append((b"x-forwarded-prefix", origin.prefix.encode("latin-1", "replace")))
    return fields


def _host_only(cookie: bytes) -> bytes:
    first, *attributes = cookie.split(b";")
    kept = [each for each in attributes if each.partition(b"=")[0].strip().lower() != b"domain"]
    return b";".join([first, *kept])
