"""The guest's agent as clients see it: part of its routes, under one token for ever. Pure.

The agent gets another token with each life of its VM. A client keeps the one that it was first
told, so what it sends is checked here and said again in the agent's terms.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from hmac import compare_digest
from typing import Final
from urllib.parse import unquote_to_bytes, urlencode

from wrenn_sandbox.errors import InvalidRequest, NotFound, Unauthorized

TOKEN_HEADER: Final = b"x-access-token"

_HEALTH: Final = b"/health"
_FILES: Final = b"/files"
_ROUTES: Final = re.compile(
    rb"/health|/metrics|/envs|/files(/compose)?"
    rb"|/(process\.Process|filesystem\.Filesystem)/[A-Za-z]+"
)
"""Everything else is between host and agent, `/init` above all."""

_PARAMETERS_MAX: Final = 32
_STANDARD_ALPHABET: Final = str.maketrans("-_ ", "+/+")
_SIGNATURE: Final = ("signature", "signature_expiration")


def checked(
    method: str, path: bytes, query: bytes, given: bytes | None, token: str, now: float
) -> tuple[bytes, bool]:
    """The target to ask the agent for, and whether the caller may do what needs its token.

    `given` is the token that came with the request, `now` the time in seconds. Raises `NotFound`
    for what only a host may ask, `Unauthorized` for a wrong token or signature, `InvalidRequest`
    for too many parameters of a signed URL.
    """
    if _ROUTES.fullmatch(path) is None:
        raise NotFound("There is no such path")
    target = path + (b"?" + query if query else b"")
    if given is not None:
        if not compare_digest(given, token.encode("ascii")):
            if path == _HEALTH:
                return target, False
            raise Unauthorized("The access token is wrong")
        return target, True
    if path == _HEALTH:
        return target, False
    values = _parsed(query) if path == _FILES else {}
    if "signature" not in values:
        raise Unauthorized("The access token is missing")
    _check_signature(values, "write" if method == "POST" else "read", token, now)
    unsigned = {name: value for name, value in values.items() if name not in _SIGNATURE}
    return path + b"?" + urlencode(unsigned, errors="surrogateescape").encode("ascii"), True


def _check_signature(values: Mapping[str, str], operation: str, token: str, now: float) -> None:
    version, _, given = values["signature"].partition("_")
    expiry = values.get("signature_expiration", "")
    parts = [values.get("path", ""), operation, values.get("username", ""), token]
    digest = hashlib.sha256(
        ":".join(parts + [expiry] * bool(expiry)).encode(errors="surrogateescape")
    )
    wanted = base64.b64encode(digest.digest()).rstrip(b"=")
    presented = given.translate(_STANDARD_ALPHABET).rstrip("=").encode(errors="surrogateescape")
    if version != "v1" or not compare_digest(presented, wanted):
        raise Unauthorized("The signature is wrong")
    if expiry and not (re.fullmatch("[0-9]{1,12}", expiry) and int(expiry) >= now):
        raise Unauthorized("The signature is already expired")


def _parsed(query: bytes) -> dict[str, str]:
    """Names to values as the agent reads them: the first of a name counts.

    Raises `InvalidRequest` for more than a signed URL has: reading 16,000 takes 20 to 50 ms.
    """
    if query.count(b"&") >= _PARAMETERS_MAX:
        raise InvalidRequest(f"A signed URL has at most {_PARAMETERS_MAX} parameters")
    values: dict[str, str] = {}
    for pair in query.replace(b"+", b" ").split(b"&"):
        name, _, value = (unquote_to_bytes(each) for each in pair.partition(b"="))
        values.setdefault(
            name.decode(errors="surrogateescape"), value.decode(errors="surrogateescape")
        )
    values.pop("", None)
    return values
