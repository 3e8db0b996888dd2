"""`Idempotency-Key`: a request that makes something may be sent again and makes it once.

A route takes a parameter `once: Once`, and answers what it gives.
"""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, TypeVar, cast

from fastapi import Depends, Header
from fastapi.routing import APIRoute
from pydantic import AfterValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from wrenn_sandbox.control.service.idempotency import Making
from wrenn_sandbox.errors import WrennError

from .authentication import CallerTeam
from .fields import ResponseModel
from .services import ServicesDependency

HEADER: Final = "Idempotency-Key"
REPLAYED: Final = "Idempotency-Replayed"
"""A header of answers that another request with the same key got before."""

_LONGEST: Final = 255
_Id = TypeVar("_Id", bound=str)


def _key(value: str) -> str:
    if not 1 <= len(value) <= _LONGEST or not (value.isascii() and value.isprintable()):
        raise ValueError(f"must be 1 to {_LONGEST} printable ASCII characters")
    return value


_Key = Annotated[
    str | None,
    AfterValidator(lambda value: None if value is None else _key(value)),
    Header(alias=HEADER, description="Makes it safe to send the same request again for 24 hours"),
    WithJsonSchema({"type": "string", "pattern": "^[ -~]{1,255}$"}),
]


class _NothingMade(Exception):
    """A request whose answer, `text`, is nothing but errors: it is tried again, as after one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class _Once:
    """A request that makes something, perhaps with a key."""

    def __init__(
        self, request: Request, team_id: CallerTeam, services: ServicesDependency, key: _Key = None
    ) -> None:
        self._request = request
        self._team_id = team_id
        self._idempotency = services.idempotency
        self._key = key

    async def answer(
        self,
        shape: type[ResponseModel],
        id: _Id,
        make: Callable[[_Id], Awaitable[object]],
        made: Callable[[_Id], Awaitable[object | None]],
        *,
        complete: Callable[[str], str] = str,
    ) -> Response:
        """Make something under this new `id`, or give what the first such request was answered.

        `made` finds what an earlier request has made under its id, if there is such a thing.
        `complete` adds to each answer what is not to be kept.
        """

        async def written(subject: str) -> str:
            made = await make(cast("_Id", subject))
            text = _json(shape, made)
            if isinstance(made, list) and all(isinstance(each, WrennError) for each in made):
                raise _NothingMade(text)
            return text

        async def found(subject: str) -> str | None:
            there = await made(cast("_Id", subject))
            return None if there is None else _json(shape, there)

        route = self._request.scope["route"]
        assert isinstance(route, APIRoute)
        headers = {}
        if self._key is None:
            text = _json(shape, await make(id))
        else:
            making = Making(id, written, found)
            digest = await self._digest()
            operation = str(route.operation_id)
            try:
                answer = await self._idempotency.answer(
                    self._team_id, operation, self._key, digest, making
                )
            except _NothingMade as nothing:
                text = nothing.text
            else:
                text = answer.text
                headers = {REPLAYED: "true"} if answer.repeated else {}
        return Response(
            complete(text),
            route.status_code or 200,
            media_type="application/json",
            headers=headers,
        )

    async def _digest(self) -> str:
        """Stands for path, query and body, byte for byte."""
        scope = self._request.scope
        path = scope["path"].encode("utf-8", "surrogatepass")
        content = b"\0".join((path, scope["query_string"], await self._request.body()))
        return hashlib.sha256(content).hexdigest()


def _json(shape: type[ResponseModel], source: object) -> str:
    if isinstance(source, list):
        return f"[{','.join(_json(shape, each) for each in source)}]"
    return shape.of(source).model_dump_json(exclude_none=True)


Once = Annotated[_Once, Depends()]
