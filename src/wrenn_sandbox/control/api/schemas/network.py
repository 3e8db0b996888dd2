"""What a sandbox reaches: `/v1/sandboxes/{id}/network`."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field

from wrenn_sandbox.model import network
from wrenn_sandbox.wire import messages

from .fields import Request

Cidrs = Annotated[
    list[str],
    Field(
        strict=False,
        max_length=network.MAX_RANGES,
        json_schema_extra={"example": ["203.0.113.0/24"]},
    ),
]
"""IPv4 ranges and addresses."""


class NetworkPolicy(Request):
    """What a sandbox reaches: `allow` wins over `deny`, and both over `internet`.

    Without `internet` there is no DNS either. This machine, other sandboxes and private, link-local
    and special ranges are closed whatever a policy says.
    """

    model_config = ConfigDict(from_attributes=True)

    internet: bool = True
    allow: Cidrs = Field([])
    deny: Cidrs = Field([])

    @classmethod
    def of(cls, policy: messages.Egress) -> Self:
        return cls.model_validate(policy)

    def egress(self) -> messages.Egress:
        return messages.Egress(
            internet=self.internet, allow=tuple(self.allow), deny=tuple(self.deny)
        )
