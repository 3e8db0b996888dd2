"""Typed ids: a prefix and 100 random bits in lower-case base32, usable in a host name."""

import base64
import hashlib
import re
import secrets
from collections.abc import Callable
from typing import NewType

UserId = NewType("UserId", str)
TeamId = NewType("TeamId", str)
KeyId = NewType("KeyId", str)
SandboxId = NewType("SandboxId", str)
ImageId = NewType("ImageId", str)
MachineId = NewType("MachineId", str)
OperationId = NewType("OperationId", str)
RequestId = NewType("RequestId", str)
InstallationId = NewType("InstallationId", str)
WebhookId = NewType("WebhookId", str)
SecretId = NewType("SecretId", str)

Random = Callable[[int], bytes]
"""Given a count, returns that many random bytes."""

new_random: Random = secrets.token_bytes
"""The system's randomness, the default wherever randomness is passed in."""

_RANDOM_CHARACTERS = 20
_ID = re.compile(r"[a-z]+-[a-z2-7]{20}")
KEY_PREFIXES = ("wrn_", "e2b_")
"""How keys begin, in either of their spellings."""

API_KEY = re.compile(r"wrn_[0-9a-f]{32}")
_E2B_KEY = re.compile(r"e2b_([0-9a-f]{32})([0-9a-f]{8})")


def _new(prefix: str, random: Random) -> str:
    text = base64.b32encode(random(13)).decode("ascii").lower()
    return f"{prefix}-{text[:_RANDOM_CHARACTERS]}"


def new_user_id(random: Random = secrets.token_bytes) -> UserId:
    return UserId(_new("usr", random))


def new_team_id(random: Random = secrets.token_bytes) -> TeamId:
    return TeamId(_new("team", random))


def new_key_id(random: Random = secrets.token_bytes) -> KeyId:
    return KeyId(_new("key", random))


def new_sandbox_id(random: Random = secrets.token_bytes) -> SandboxId:
    return SandboxId(_new("sb", random))


def new_secret_id(random: Random = secrets.token_bytes) -> SecretId:
    return SecretId(_new("sec", random))


def new_image_id(random: Random = secrets.token_bytes) -> ImageId:
    return ImageId(_new("img", random))


def new_machine_id(random: Random = secrets.token_bytes) -> MachineId:
    return MachineId(_new("vm", random))


def new_operation_id(random: Random = secrets.token_bytes) -> OperationId:
    return OperationId(_new("op", random))


def new_request_id(random: Random = secrets.token_bytes) -> RequestId:
    return RequestId(_new("req", random))


def new_tag(random: Random = secrets.token_bytes) -> str:
    """A name for a command in a guest: `proc-` and eight letters or digits."""
    return "proc-" + base64.b32encode(random(5)).decode("ascii").lower()


def new_installation_id(random: Random = secrets.token_bytes) -> InstallationId:
    return InstallationId(_new("inst", random))


def new_webhook_id(random: Random = secrets.token_bytes) -> WebhookId:
    return WebhookId(_new("wh", random))


def new_webhook_secret(random: Random = secrets.token_bytes) -> str:
    """What a webhook's deliveries are signed with: `whsec_` and 64 lower-case hex digits."""
    return "whsec_" + random(32).hex()


def is_id(prefix: str, value: str) -> bool:
    """Whether `value` has the form of an id with this prefix."""
    return value.startswith(prefix + "-") and _ID.fullmatch(value) is not None


def new_api_key(random: Random = secrets.token_bytes) -> str:
    """A key as its holder sees it: `wrn_` and 32 lower-case hex digits."""
    return "wrn_" + random(16).hex()


def api_key_digest(key: str) -> str:
    """SHA-256 of a key in hex: the only form in which a key is stored."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def e2b_key(key: str) -> str:
    """An API key as clients want it that insist on E2B's form.

    `e2b_`, the key's 32 digits and 8 that depend on them, so that a mistyped one is seen.
    """
    digits = key.removeprefix("wrn_")
    return f"e2b_{digits}{api_key_digest(key)[:8]}"


def plain_api_key(text: str) -> str | None:
    """The API key that is written either way; None for what is none."""
    if API_KEY.fullmatch(text):
        return text
    match = _E2B_KEY.fullmatch(text)
    key = "wrn_" + match[1] if match else ""
    return key if match and e2b_key(key) == text else None


def api_key_prefix(key: str) -> str:
    """What a listing shows of a key: its first twelve characters and three dots."""
    return key[:12] + "..."
