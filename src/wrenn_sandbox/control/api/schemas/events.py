"""What happened to a sandbox: `/v1/sandboxes/{id}/events`."""

from datetime import datetime
from typing import Annotated

from pydantic import Field, WithJsonSchema

from .fields import NullableText, Response


class SandboxEvent(Response):
    """One transition of a sandbox. `from` is absent for its creation."""

    event: str
    from_state: Annotated[
        str | None,
        Field(serialization_alias="from"),
        WithJsonSchema({"type": "string", "nullable": True}),
    ] = None
    to_state: Annotated[str, Field(serialization_alias="to")]
    reason: NullableText = None
    actor: str
    time: Annotated[datetime, Field(validation_alias="at")]
