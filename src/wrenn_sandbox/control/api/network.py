"""`/v1/sandboxes/{id}/network`: what a sandbox may reach."""

from fastapi import APIRouter

from wrenn_sandbox.control.api.schemas.network import NetworkPolicy

from .authentication import CallerTeam
from .body import JsonBody
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


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
