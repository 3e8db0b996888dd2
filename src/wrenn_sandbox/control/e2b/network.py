"""What a sandbox may reach, as E2B says it."""

from collections.abc import Sequence
from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import AfterValidator, Field

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.body import JsonBody
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.services import ServicesDependency
from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.model.network import MAX_RANGES
from wrenn_sandbox.wire.messages import Egress

from .fields import E2BRequest, E2BResponse, Unsupported

router = APIRouter(prefix="/sandboxes", tags=["e2b"])


def _no_names(value: list[str]) -> list[str]:
    for each in value:
        if any(character.isalpha() for character in each) and ":" not in each:
            raise ValueError(f"{each[:64]} is a name: only IPv4 addresses and ranges can be denied")
    return value


_Entries = Annotated[list[str], Field(max_length=MAX_RANGES)]
_Ranges = Annotated[_Entries, AfterValidator(_no_names)]


class Reach(E2BRequest):
    """Destinations: what `allowOut` lists, names too, is open, whatever `denyOut` says."""

    allow_out: _Entries | None = None
    deny_out: _Ranges | None = None
    dns_servers: Unsupported = None
    egress_proxy: Unsupported = None
    rules: Unsupported = None

    def egress(self, internet: bool | None) -> Egress:
        return Egress(
            internet=internet is not False,
            allow=tuple(self.allow_out or ()),
            deny=tuple(self.deny_out or ()),
        )


class NewNetwork(Reach):
    """Without `allowPublicTraffic` requests to ports need the sandbox's token."""

    allow_public_traffic: bool | None = None
    mask_request_host: Unsupported = None
    https_ports: Unsupported = None


class NetworkUpdate(Reach):
    """What is left out has its default."""

    allow_internet_access: Annotated[bool | None, Field(alias="allow_internet_access")] = None


class Network(E2BResponse):
    allow_out: Sequence[str]
    deny_out: Sequence[str]
    allow_public_traffic: bool

    @classmethod
    def of(cls, source: object) -> Self:
        assert isinstance(source, Sandbox)
        return cls(
            allow_out=source.network.allow,
            deny_out=source.network.deny,
            allow_public_traffic=not source.private_ports,
        )


@router.put(
    "/{id}/network",
    operation_id="e2bSetNetwork",
    status_code=204,
    responses=failures(400, 401, 404, 409, 413, 502, 503),
)
async def set_network(
    id: str, team_id: CallerTeam, services: ServicesDependency, body: JsonBody[NetworkUpdate]
) -> None:
    """Replace what a sandbox may reach."""
    wanted = body.egress(body.allow_internet_access)
    await services.sandboxes.set_network(team_id, id, wanted)
