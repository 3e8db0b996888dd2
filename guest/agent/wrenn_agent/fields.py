"""Reading typed fields out of JSON messages; a wrong type is InvalidArgument naming the field.

A field that is absent or null has its default value, as in protobuf's JSON mapping.
"""

from __future__ import annotations

import binascii
import json

from .errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

Message = dict[str, object]


def parse(data: bytes) -> Message:
    """A JSON object; an empty body counts as `{}`."""
    try:
        value: object = json.loads(data.decode()) if data else {}
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("body is not valid JSON") from error
    if not isinstance(value, dict):
        raise InvalidArgument("body must be a JSON object")
    return value


def _field(message: Message, name: str, kind: type[T], wanted: str) -> T | None:
    value = message.get(name)
    if value is not None and not isinstance(value, kind):
        raise InvalidArgument(f"{name} must be {wanted}")
    return value


def text(message: Message, name: str) -> str:
    """A string."""
    return _field(message, name, str, "a string") or ""


def path(message: Message, name: str) -> str:
    """A path; with the prefix `raw` the field holds base64 of its bytes, whatever they are."""
    raw = data(message, f"raw{name.capitalize()}")
    return text(message, name) if raw is None else raw.decode("utf-8", "surrogateescape")


def number(message: Message, name: str, default: int = 0) -> int:
    """A whole number, given as a number or as its decimal digits."""
    value = message.get(name)
    if value is None:
        return default
    if isinstance(value, str) and value.isascii() and value.lstrip("-").isdigit():
        value = int(value[:20])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"{name} must be a whole number")
    return value


def flag(message: Message, name: str, default: bool = False) -> bool:
    """A boolean."""
    value = _field(message, name, bool, "true or false")
    return default if value is None else value


def nested(message: Message, name: str) -> Message | None:
    """An object, None when absent."""
    return _field(message, name, dict, "an object")


def texts(message: Message, name: str) -> list[str]:
    """A list of strings."""
    value = _field(message, name, list, "a list of strings") or []
    if not all(isinstance(item, str) for item in value):
        raise InvalidArgument(f"{name} must be a list of strings")
    return value


def text_map(message: Message, name: str) -> dict[str, str]:
    """An object whose values are strings."""
    result: dict[str, str] = {}
    for key, item in (nested(message, name) or {}).items():
        if not isinstance(item, str):
            raise InvalidArgument(f"{name}.{key} must be a string")
        result[key] = item
    return result


def data(message: Message, name: str) -> bytes | None:
    """Bytes in base64 (standard or URL-safe alphabet, padding optional), None when absent."""
    value = _field(message, name, str, "base64 text")
    if value is None:
        return None
    standard = value.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return binascii.a2b_base64(standard + "=" * (-len(standard) % 4), strict_mode=True)
    except ValueError as error:
        raise InvalidArgument(f"{name} is not valid base64") from error
