"""What happened to a sandbox: `/v1/sandboxes/{id}/events`."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import Field, WithJsonSchema

from wrenn_sandbox.control.store import records

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
    time: datetime

    @classmethod
    def of(cls, event: records.SandboxEvent) -> Self:
        return cls(
            event=event.event,
            from_state=event.from_state,
            to_state=event.to_state,
            reason=event.reason,
            actor=event.actor,
            time=event.at,
        )
