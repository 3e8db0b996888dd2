"""JSON bodies: read after the credential was checked, parsed strictly, described in OpenAPI.

A body is parsed from its bytes at once, so that bad UTF-8, lone surrogates, deep nesting and
numbers that JSON does not have are refused with a message and never reach a service.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from wrenn_sandbox.errors import InvalidRequest

from .errors import invalid

Model = TypeVar("Model", bound=BaseModel)


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that gives the request's body as a `model`; an empty body counts as `{}`."""

    async def body(request: Request) -> Model:
        try:
            content = await request.body()
        except ClientDisconnect as error:
            raise InvalidRequest("The body is not complete") from error
        content_type = request.headers.get("content-type")
        if content and content_type is not None and not _is_json(content_type):
            raise InvalidRequest("The body must be JSON: send Content-Type: application/json")
        try:
            return model.model_validate_json(content.strip() or b"{}")
        except ValidationError as error:
            raise invalid(error.errors(include_url=False, include_input=False)) from error

    return body


def described(model: type[BaseModel]) -> dict[str, object]:
    """What OpenAPI says of the body; `openapi.py` adds the schema that it refers to."""
    BODIES.add(model)
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


BODIES: set[type[BaseModel]] = set()
