"""What the shapes of E2B's API are made of, named as on the wire."""

from typing import Annotated, ClassVar, Final

from fastapi import Depends
from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel
from starlette.requests import Request

from wrenn_sandbox.control.api.fields import Integer, RequestModel, ResponseModel
from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.model.limits import DEADLINE_MAX_SEC

_WRITTEN: Final = {"Id": "ID", "Mb": "MB"}
PAGE_MAX: Final = 100
"""Entries of a list that one answer has, and has where the caller says nothing."""


def _name(field: str) -> str:
    name = to_camel(field)
    return name[:-2] + _WRITTEN.get(name[-2:], name[-2:])


def _nothing(value: object) -> None:
    if value not in (None, [], {}):
        raise ValueError("is not supported by this server")


def _true(value: bool) -> bool:
    if not value:
        raise ValueError("false is not supported by this server")
    return value


async def _known_query(request: Request) -> None:
    """A filter that is not known would let through what the caller does not mean."""
    known = {each.alias for each in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(f"{name}: is not a parameter that this server knows")


KNOWN_QUERY: Final = Depends(_known_query)
"""Refuses parameters of the query that a route does not have."""

Unsupported = Annotated[object, AfterValidator(_nothing), WithJsonSchema({})]
"""Something that E2B has and this server does not: refused unless it is empty."""

AlwaysTrue = Annotated[bool, AfterValidator(_true)]
"""What cannot be switched off."""

Seconds = Annotated[Integer, Field(ge=0, le=DEADLINE_MAX_SEC)]
"""Time until a sandbox ends or is paused, from now on."""


class E2BRequest(RequestModel):
    """What clients send. Unknown fields are refused: who sends one relies on it."""

    model_config = ConfigDict(alias_generator=_name, extra="forbid", validate_by_name=False)
    needed: ClassVar[bool] = False


class E2BResponse(ResponseModel):
    """What clients are sent."""

    model_config = ConfigDict(
        alias_generator=_name,
        validate_by_name=True,
        validate_by_alias=False,
        serialize_by_alias=True,
    )
