"""`/v1/sandboxes/{id}/network`: what a sandbox may reach."""

from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import ConfigDict, Field

from wrenn_sandbox.model import network
from wrenn_sandbox.model.secrets import HEADER_LENGTH, HEADERS, TEMPLATE_LENGTH, HeaderRule
from wrenn_sandbox.wire import messages

from .authentication import CallerTeam
from .body import JsonBody
from .fields import RequestModel
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])

Cidrs = Annotated[
    list[str],
    Field(
        strict=False,
        max_length=network.MAX_RANGES,
        json_schema_extra={"example": ["203.0.113.0/24"]},
    ),
]
"""IPv4 ranges and addresses."""
CidrsAndNames = Annotated[
    list[str],
    Field(
        strict=False,
        max_length=network.MAX_RANGES,
        json_schema_extra={"example": ["203.0.113.0/24", "example.com", "*.example.org"]},
    ),
]
"""The same, and names of hosts."""


class SecretHeader(RequestModel):
    """Requests by HTTPS, on port 443, to the host `name` have this header.

    `value` refers to a secret, such as `Bearer {{secret:openai}}`. The host's egress proxy sets it
    in place of what the sandbox has sent, and the sandbox never sees it. `*.example.com` is every
    name with one more label.
    """

    model_config = ConfigDict(from_attributes=True)

    name: Annotated[str, Field(max_length=255, json_schema_extra={"example": "api.example.com"})]
    header: Annotated[str, Field(max_length=HEADER_LENGTH)]
    value: Annotated[
        str,
        Field(
            max_length=TEMPLATE_LENGTH,
            json_schema_extra={"example": "Bearer {{secret:openai}}"},
        ),
    ]


class NetworkPolicy(RequestModel):
    """What a sandbox reaches: `allow` wins over `deny`, and both over `internet`.

    A name in `allow` opens HTTP on port 80 and HTTPS on port 443 of that host; `*.example.com` is
    every name below it. Without `internet` and names there is no DNS either. This machine, other
    sandboxes and private, link-local and special ranges are closed whatever a policy says.
    """

    model_config = ConfigDict(from_attributes=True)

    internet: bool = True
    allow: CidrsAndNames = Field([])
    deny: Cidrs = Field([])
    secrets: Annotated[list[SecretHeader], Field(strict=False, max_length=HEADERS)] = Field([])

    @classmethod
    def of(cls, policy: messages.Egress) -> Self:
        return cls.model_validate(policy)

    def egress(self) -> messages.Egress:
        return messages.Egress(
            internet=self.internet,
            allow=tuple(self.allow),
            deny=tuple(self.deny),
            secrets=tuple(HeaderRule(each.name, each.header, each.value) for each in self.secrets),
        )


@router.get("/{id}/network", operation_id="getNetworkPolicy", responses=failures(401, 404))
async def get_network_policy(
    id: str, team_id: CallerTeam, services: ServicesDependency
) -> NetworkPolicy:
    """The network policy of a sandbox."""
    sandbox = await services.sandboxes.get(team_id, id)
    return NetworkPolicy.of(sandbox.network)


@router.put(
    "/{id}/network",
    operation_id="setNetworkPolicy",
    responses=failures(400, 401, 404, 409, 413, 502, 503),
)
async def set_network_policy(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[NetworkPolicy],
) -> NetworkPolicy:
    """Replace the policy of a running or paused sandbox; holds at once, for open connections too.

    What is left out has its default.
    """
    return NetworkPolicy.of(await services.sandboxes.set_network(team_id, id, body.egress()))
