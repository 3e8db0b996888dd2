"""Who may call (the access token, signed URLs) and as whom (the acting user)."""

from __future__ import annotations

import binascii
import time

# what `hmac` falls back to; importing `hmac` or `hashlib` would load all of OpenSSL
from _operator import _compare_digest as same

from .errors import InvalidArgument, Unauthenticated
from .users import User, Users

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .exchange import Exchange

_FILES = "/files"
_OPEN_PATHS = ("/health",)
_STANDARD_ALPHABET = {ord("-"): "+", ord("_"): "/", ord(" "): "+"}
"""Undoes URL-safe base64, and a plus sign that was read as a space."""


class Auth:
    """The access token (None until /init sets one) and the default user."""

    def __init__(self, users: Users, default_user: str | None = None) -> None:
        self._users = users
        self.token: str | None = None
        self.default_user = default_user or users.default()

    def admit(self, exchange: Exchange) -> None:
        """Check the credentials of a request; raises Unauthenticated."""
        head = exchange.head
        if self.token is None or head.path in _OPEN_PATHS:
            return
        given = head.headers.get("x-access-token")
        if given is None and head.path == _FILES and "signature" in head.query:
            self._check_signature(head.query, "write" if head.method == "POST" else "read")
        elif given is None or not same(given.encode("latin-1"), self.token.encode()):
            raise Unauthenticated("access token missing or wrong")

    def user_of(self, exchange: Exchange) -> User:
        """The user that a request wants to act as; an unknown one is Unauthenticated."""
        head = exchange.head
        name = head.query.get("username") if head.path == _FILES else None
        name = name or _basic_user(head.headers.get("authorization", ""))
        try:
            return self.user(name)
        except InvalidArgument as error:
            raise Unauthenticated(error.message) from error

    def user(self, name: str | None) -> User:
        """The account called `name`, the default user without one."""
        return self._users.find(name or self.default_user)

    def _check_signature(self, query: dict[str, str], operation: str) -> None:
        version, _, given = query["signature"].partition("_")
        given = given.translate(_STANDARD_ALPHABET).rstrip("=")
        expiry = query.get("signature_expiration")
        parts = [query.get("path", ""), operation, query.get("username", ""), self.token or ""]
        if expiry:
            parts.append(expiry)
        if version != "v1" or not same(given.encode(), _digest(":".join(parts)).encode()):
            raise Unauthenticated("signature is wrong")
        if expiry and (not expiry.isdigit() or int(expiry) < time.time()):
            raise Unauthenticated("signature is already expired")


def _digest(text: str) -> str:
    import hashlib  # only signed URLs need it

    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return binascii.b2a_base64(digest, newline=False).rstrip(b"=").decode()


def _basic_user(authorization: str) -> str | None:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        credentials = binascii.a2b_base64(encoded.strip().encode("latin-1"), strict_mode=True)
        return credentials.decode().partition(":")[0] or None
    except ValueError as error:
        raise InvalidArgument("malformed Authorization header") from error
