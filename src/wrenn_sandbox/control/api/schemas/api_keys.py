"""Keys: `/v1/api-keys`."""

from datetime import datetime
from typing import Annotated

from pydantic import StringConstraints

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
