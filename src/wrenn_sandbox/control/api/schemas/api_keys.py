"""Keys: `/v1/api-keys`."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import StringConstraints

from wrenn_sandbox.control.store import records

from .fields import Argument, NullableText, NullableTime, Request, Response


class CreateAPIKeyRequest(Request):
    name: Annotated[Argument, StringConstraints(max_length=200)] = "Unnamed API Key"


class APIKeyResponse(Response):
    """`key` is there only in the answer to its creation: it is not kept."""

    id: str
    team_id: str
    name: str
    key_prefix: str
    created_at: datetime
    last_used: NullableTime = None
    key: NullableText = None

    @classmethod
    def of(cls, key: records.ApiKey, secret: str | None = None) -> Self:
        return cls(
            id=key.id,
            team_id=key.team_id,
            name=key.name,
            key_prefix=key.key_prefix,
            created_at=key.created_at,
            last_used=key.last_used,
            key=secret,
        )
