"""JSON bodies: read after the credential was checked, and parsed strictly.

A body is parsed from its bytes at once, so that bad UTF-8, lone surrogates, deep nesting and
numbers that JSON does not have are refused with a message and never reach a service.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Final, Generic, TypeVar
from weakref import WeakValueDictionary

from fastapi import Depends
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from wrenn_sandbox.errors import InvalidRequest

from .errors import invalid
from .fields import RequestModel
from .forwarded import group_of
from .middleware import client_address

Model = TypeVar("Model", bound=RequestModel)

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


class BodyReader(Generic[Model]):
    """A dependency that gives the request's body as a `model`; an empty body counts as `{}`."""

    def __init__(self, model: type[Model]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> Model:
        try:
            content = await request.body()
        except ClientDisconnect as error:
            raise InvalidRequest("The body is not complete") from error
        content_type = request.headers.get("content-type")
        if content and content_type is not None and not _is_json(content_type):
            raise InvalidRequest("The body must be JSON: send Content-Type: application/json")
        async with _turns_of(request).turn(client_address(request.scope), len(content)):
            try:
                return self.model.model_validate_json(content.strip() or b"{}")
            except ValidationError as error:
                raise invalid(error.errors(include_url=False, include_input=False)) from error


if TYPE_CHECKING:
    JsonBody = Annotated[Model, BodyReader]
else:

    class JsonBody:
        """The type of a route's parameter that is the request's body."""

        def __class_getitem__(cls, model: type[Model]) -> object:
            return Annotated[model, Depends(BodyReader(model))]
