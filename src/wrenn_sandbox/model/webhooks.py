"""Rules of webhooks: URLs, signatures, when to try again and when to give up."""

import hmac
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from .destinations import Network, may_be_called

PER_TEAM: Final = 20
DELIVERIES_KEPT: Final = 100
"""How many of its last deliveries are known of a webhook."""

URL_LENGTH: Final = 2048
DESCRIPTION_LENGTH: Final = 200

GIVE_UP_AFTER: Final = timedelta(hours=24)
"""How long one event is tried; then it has failed, and the next one is."""

DISABLE_AFTER: Final = timedelta(days=3)
"""How long a webhook may fail without one success until it is disabled."""

_DELAYS_SEC: Final = (5, 30, 120, 600, 1800, 3600, 7200, 10_800)


class InvalidUrl(ValueError):
    """A URL that no webhook may have; `str()` says why."""


def check_url(url: str, allowed: Sequence[Network]) -> None:
    """Raise `InvalidUrl` for what is no URL to deliver to, as far as the URL alone tells.

    A name is not looked up: what it leads to is seen at each delivery.
    """
    if len(url) > URL_LENGTH or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidUrl(f"must be a URL of at most {URL_LENGTH} ASCII characters")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise InvalidUrl("must be an http or https URL such as https://example.com/hook")
    if "@" in parts.netloc or "#" in url:
        raise InvalidUrl("must have neither a user nor a fragment")
    try:
        address = ip_address(host)
    except ValueError:
        return
    if not may_be_called(address, allowed):
        raise InvalidUrl("must not be a private or reserved address")


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """`v1=` and the HMAC-SHA256 of `TIMESTAMP.BODY` in hex, the time as Unix time in seconds."""
    message = b"%d.%b" % (timestamp, body)
    return "v1=" + hmac.digest(secret.encode("ascii"), message, "sha256").hex()


def delay_after(attempts: int, jitter: float) -> timedelta:
    """How long to wait after so many failures of one event; `jitter` is from 0 to 1."""
    seconds = _DELAYS_SEC[min(attempts, len(_DELAYS_SEC)) - 1]
    return timedelta(seconds=seconds * (0.8 + 0.4 * jitter))
