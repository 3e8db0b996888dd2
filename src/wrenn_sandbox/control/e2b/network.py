"""What a sandbox may reach, as E2B says it."""

from collections.abc import Sequence
from typing import Annotated, Self

import msgspec
from fastapi import APIRouter
from pydantic import AfterValidator, Field

from wrenn_sandbox.control.api.authentication import CallerTeam
from wrenn_sandbox.control.api.body import JsonBody
from wrenn_sandbox.control.api.responses import failures
from wrenn_sandbox.control.api.services import ServicesDependency
from wrenn_sandbox.control.store.records import Sandbox
from wrenn_sandbox.model.network import MAX_RANGES, InvalidPolicy, NetworkPolicy
from wrenn_sandbox.wire.messages import Egress

from .fields import E2BRequest, E2BResponse, Unsupported

router = APIRouter(prefix="/sandboxes", tags=["e2b"])


def _open(value: list[str]) -> list[str]:
    return _refusing(value, allow=value)


def _closed(value: list[str]) -> list[str]:
    return _refusing(value, deny=value)


def _refusing(value: list[str], allow: Sequence[str] = (), deny: Sequence[str] = ()) -> list[str]:
    """The entries as they are, if they can be; an error tells of E2B's own field."""
    try:
        NetworkPolicy.parse(internet=True, allow=allow, deny=deny)
    except InvalidPolicy as error:
        raise ValueError(str(error).partition(": ")[2]) from error
    return value


_Entries = Annotated[list[str], Field(max_length=MAX_RANGES)]


class Reach(E2BRequest):
    """Destinations: what `allowOut` lists, names too, is open, whatever `denyOut` says."""

    allow_out: Annotated[_Entries, AfterValidator(_open)] | None = None
    deny_out: Annotated[_Entries, AfterValidator(_closed)] | None = None
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
    kept = (await services.sandboxes.get(team_id, id)).network.secrets  # unknown to these clients
    wanted = msgspec.structs.replace(wanted, secrets=kept)
    await services.sandboxes.set_network(team_id, id, wanted)
