"""The headers that every answer carries."""

from typing import Final

_ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_OVER_TLS: Final = (*_ALWAYS, (b"strict-transport-security", b"max-age=31536000"))

Headers = list[tuple[bytes, bytes]]


def secured(headers: Headers, scheme: str) -> Headers:
    """`headers` and those of security that they do not set themselves.

    Answers of the API belong in no cache, no frame and no page; over TLS (`https`, `wss`) browsers
    are told to stay with it for a year.
    """
    present = {name.lower() for name, _ in headers}
    wanted = _OVER_TLS if scheme in ("https", "wss") else _ALWAYS
    return [*headers, *(each for each in wanted if each[0] not in present)]
