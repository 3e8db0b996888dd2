"""JSON bodies: read after the credential was checked, parsed strictly, described in OpenAPI.

A body is parsed from its bytes at once, so that bad UTF-8, lone surrogates, deep nesting and
numbers that JSON does not have are refused with a message and never reach a service.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from wrenn_sandbox.errors import InvalidRequest

from .errors import invalid
from .forwarded import group_of
from .middleware import client_address

Model = TypeVar("Model", bound=BaseModel)

_LARGE: Final = 16 << 10
"""Bytes of a body that may take milliseconds to parse; one of 1 MiB can take 150."""


class ParseTurns:
    """Lets a client address have one large body parsed at a time, and half of the time at most.

    Nothing else runs while a body is parsed.
    """

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, address: str, size: int) -> AsyncIterator[None]:
        """When `size` bytes from this address may be parsed."""
        if size < _LARGE:
            yield
            return
        async with self._turns.setdefault(group_of(address), asyncio.Lock()):
            begin = time.perf_counter()
            try:
                yield
            finally:
                await asyncio.sleep(time.perf_counter() - begin)


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


def _turns_of(request: Request) -> ParseTurns:
    turns = request.app.state.parsing_turns
    assert isinstance(turns, ParseTurns)
    return turns


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
        async with _turns_of(request).turn(client_address(request.scope), len(content)):
            try:
                return model.model_validate_json(content.strip() or b"{}")
            except ValidationError as error:
                raise invalid(error.errors(include_url=False, include_input=False)) from error

    return body


def described(model: type[BaseModel], *, required: bool = True) -> dict[str, object]:
    """What OpenAPI says of the body; `openapi.py` adds the schema that it refers to."""
    BODIES.add(model)
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": required, "content": content}}


BODIES: set[type[BaseModel]] = set()
