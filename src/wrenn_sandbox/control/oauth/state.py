"""The state of a login under way, held by the browser alone: pure, signed, good for ten minutes.

The cookie is `STATE.EXPIRY.MAC`: 32 random bytes in base64url, a Unix time in seconds and the
HMAC-SHA256 of provider, state and expiry in hex. The PKCE verifier (RFC 7636) is an HMAC of
provider and state under another key, so that nothing needs to be kept on the server in between.
Both keys are derived from the secret that signs tokens and serve this purpose alone.
"""

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from wrenn_sandbox.control.clock import Clock
from wrenn_sandbox.errors import StateRefused
from wrenn_sandbox.ids import Random, new_random

LIFETIME: Final = timedelta(minutes=10)
_STATE_BYTES: Final = 32
_COOKIE: Final = re.compile(r"([A-Za-z0-9_-]{43})\.([0-9]{1,12})\.([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Issued:
    """The beginning of a login: what the provider is told, and what the browser keeps."""

    state: str
    challenge: str
    cookie: str


@dataclass(frozen=True, slots=True)
class Proven:
    """A state that came back to the browser that it was made for."""

    state: str
    verifier: str
    expires_at: datetime


class States:
    """Makes and checks states, from `secret` and for one provider each."""

    def __init__(self, secret: str, *, clock: Clock, random: Random = new_random) -> None:
        self._cookie_key = _derived(secret, "wrenn oauth state cookie")
        self._verifier_key = _derived(secret, "wrenn oauth pkce verifier")
        self._clock = clock
        self._random = random

    def issue(self, provider: str) -> Issued:
        state = _base64url(self._random(_STATE_BYTES))
        expiry = int((self._clock() + LIFETIME).timestamp())
        digest = hashlib.sha256(self._verifier(provider, state).encode("ascii")).digest()
        return Issued(
            state=state,
            challenge=_base64url(digest),
            cookie=f"{state}.{expiry}.{self._mac(provider, state, expiry)}",
        )

    def check(self, provider: str, cookie: str | None, state: str | None) -> Proven:
        """What cookie and state prove together; raises `StateRefused`, its detail says why."""
        if cookie is None or state is None:
            raise _refused("missing")
        parts = _COOKIE.fullmatch(cookie)
        if parts is None:
            raise _refused("malformed")
        kept, expiry, mac = parts[1], int(parts[2]), parts[3]
        if not _equal(mac, self._mac(provider, kept, expiry)):
            raise _refused("forged, or made for another provider")
        if not _equal(state, kept):
            raise _refused("another login's")
        if self._clock().timestamp() >= expiry:
            raise _refused("expired")
        return Proven(kept, self._verifier(provider, kept), datetime.fromtimestamp(expiry, UTC))

    def _mac(self, provider: str, state: str, expiry: int) -> str:
        message = f"{provider}\n{state}\n{expiry}"
        return hmac.digest(self._cookie_key, message.encode("utf-8"), "sha256").hex()

    def _verifier(self, provider: str, state: str) -> str:
        message = f"{provider}\n{state}"
        return _base64url(hmac.digest(self._verifier_key, message.encode("utf-8"), "sha256"))


def _derived(secret: str, purpose: str) -> bytes:
    return hmac.digest(secret.encode("utf-8"), purpose.encode("ascii"), "sha256")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode("utf-8"))


def _refused(why: str) -> StateRefused:
    return StateRefused("This login is not in progress here; start again", detail=f"state {why}")
