"""What the shapes at the edge are made of, named as in the contract.

Those of a route are in its module. Absent values are left out of answers.
"""

import re
from datetime import datetime
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from wrenn_sandbox.model.limits import (
    ENVIRONMENT_BYTES,
    ENVIRONMENT_NAMES,
    LABEL_KEY_MAX,
    LABEL_VALUE_MAX,
    LABELS_BYTES,
    LABELS_MAX,
)

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_TAG = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _within(limit: int, value: dict[str, str]) -> None:
    if sum(len(text.encode()) for pair in value.items() for text in pair) > limit:
        raise ValueError(f"must not be longer than {limit} bytes together")


def _environment(value: dict[str, str]) -> dict[str, str]:
    for name, content in value.items():
        if not name or "=" in name or "\0" in name or "\0" in content:
            raise ValueError("names must be neither empty nor hold = or NUL, values no NUL")
    return value


def _defaults(value: dict[str, str]) -> dict[str, str]:
    if len(value) > ENVIRONMENT_NAMES:
        raise ValueError(f"must not be more than {ENVIRONMENT_NAMES} variables")
    if not all(_VARIABLE.fullmatch(name) for name in value):
        raise ValueError(
            "names must be 1 to 128 letters, digits or '_', and not begin with a digit"
        )
    _within(ENVIRONMENT_BYTES, value)
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    if len(value) > LABELS_MAX:
        raise ValueError(f"must not be more than {LABELS_MAX}")
    for key, text in value.items():
        if not 1 <= len(key) <= LABEL_KEY_MAX or len(text) > LABEL_VALUE_MAX:
            raise ValueError(
                f"keys must have 1 to {LABEL_KEY_MAX} characters, values {LABEL_VALUE_MAX} at most"
            )
        _without_nul(key + text)
    _within(LABELS_BYTES, value)
    return value


def _tag(value: str) -> str:
    if not _TAG.fullmatch(value) or value.isdigit():
        raise ValueError("must be 1 to 64 letters, digits, '.', '_' or '-', and not digits only")
    return value


Integer = Annotated[int, BeforeValidator(_whole)]
"""A JSON number without a fraction, whether written 1 or 1.0."""

Argument = Annotated[str, AfterValidator(_without_nul)]
"""Text that a program can be given."""

NullableTime = Annotated[
    datetime | None,
    WithJsonSchema({"type": "string", "format": "date-time", "nullable": True}),
]
NullableText = Annotated[str | None, WithJsonSchema({"type": "string", "nullable": True})]
NullableInteger = Annotated[int | None, WithJsonSchema({"type": "integer", "nullable": True})]
Environment = Annotated[dict[str, str], AfterValidator(_environment)]
"""Environment variables that a program can be given."""

DefaultEnvironment = Annotated[Environment, AfterValidator(_defaults)]
"""Environment variables of all commands in a sandbox."""

Metadata = Annotated[dict[str, str], AfterValidator(_labels)]
"""A caller's labels for a sandbox."""

Tag = Annotated[str, AfterValidator(_tag)]
"""A caller's name for a command."""

OptionalArgument = Annotated[Argument | None, WithJsonSchema({"type": "string"})]


class RequestModel(BaseModel):
    """What callers send; unknown fields are ignored. `needed` says whether they have to."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    needed: ClassVar[bool] = True


class ResponseModel(BaseModel):
    """What callers are sent."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    @classmethod
    def of(cls, source: object) -> Self:
        """The answer whose fields are the attributes, or the items, of `source`."""
        return cls.model_validate(source)
