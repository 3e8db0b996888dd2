"""`/v1/sandboxes/{id}/ports`: where the ports of a sandbox are reached, and a way to them."""

import re
from functools import partial
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from wrenn_sandbox.control.service.ports import PortService
from wrenn_sandbox.control.store.sandboxes import Exposed
from wrenn_sandbox.edge.address import host_of, port_of
from wrenn_sandbox.edge.exchange import Exchange, target_of
from wrenn_sandbox.edge.head import Origin, client_of
from wrenn_sandbox.errors import NotFound
from wrenn_sandbox.wire.guest import AGENT_PORT

from .authentication import AnyCaller, CallerTeam
from .fields import ResponseModel
from .middleware import HEAD_ALONE
from .responses import failures
from .services import Services, ServicesDependency

router = APIRouter(prefix="/v1/sandboxes", tags=["ports"])
BODY_LIMITS: Final = ((re.compile(r"/v1/sandboxes/[^/]+/ports/[^/]+/.*", re.DOTALL), None),)
_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_PORT: Final = re.compile(r":[0-9]{1,5}$")
_ABOVE: Final = re.compile(rb"/v1/(sandboxes|capsules)/[^/?]+/ports/[^/?]+(?=/)")
"""What stands before the path that a guest is asked for."""


class Ports(ResponseModel):
    """`url` with a port in the place of `{port}` is its address.

    Where ports are private, requests send `token` as `e2b-traffic-access-token`. Requests to port
    49983, the guest agent, send `agent_token` as `X-Access-Token`. Both stay the same as long as
    there is the sandbox.
    """

    url: str
    domain: str
    private: bool
    token: str
    agent_token: str


@router.get("/{id}/ports", operation_id="getPorts", responses=failures(401, 404))
async def get_ports(
    id: str, request: Request, team_id: CallerTeam, services: ServicesDependency
) -> Ports:
    """Where the ports of a sandbox are reached."""
    sandbox = await services.ports.find(id, team_id)
    domain = services.ports.domain
    port = _PORT.search(request.headers.get("host", ""))
    host = host_of("{port}", sandbox.id, domain) + (port[0] if port else "")
    return Ports(
        url=f"{request.url.scheme}://{host}",
        domain=domain,
        private=sandbox.private_ports,
        token=services.ports.traffic_token(sandbox.id),
        agent_token=services.ports.agent_token(sandbox.id),
    )


async def reach_port(
    id: str, port: str, path: str, caller: AnyCaller, services: ServicesDependency
) -> Response:
    """What a program in the sandbox says on this port; WebSockets and other upgrades too.

    It is asked for `path` as that came. Nothing of its answer can run or be kept under the origin
    of the API.
    """
    sandbox = await services.ports.find(id, caller.team_id)
    number = port_of(port)
    if number == AGENT_PORT:
        raise NotFound("The guest agent has no path here; use the address of its port")
    return _PortAnswer(services, caller, sandbox, number)


for method in _METHODS:
    router.add_api_route(
        "/{id}/ports/{port}/{path:path}",
        reach_port,
        methods=[method],
        operation_id=f"{method.lower()}Port",
        response_class=Response,
        responses=failures(400, 401, 404, 409, 429, 502, 503),
    )


class _PortAnswer(Response):
    """The guest's own answer."""

    def __init__(self, services: Services, caller: AnyCaller, sandbox: Exposed, port: int) -> None:
        super().__init__()
        self._services = services
        self._caller = caller
        self._sandbox = sandbox
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if HEAD_ALONE in scope:
            scope = {**scope, "method": "HEAD"}
        ports: PortService = self._services.ports
        target = target_of(scope)
        above = _ABOVE.match(target)
        if above is None:  # a slash of it is encoded
            raise NotFound("There is no such path")
        prefix = above[0].decode("ascii")
        origin = Origin(client_of(scope), scope["scheme"], own=False, prefix=prefix)
        exchange = Exchange(scope, receive, send, origin)
        with self._services.revocations.following(self._caller) as revoked:
            async with ports.using(self._sandbox, trusted=True) as guest:
                await exchange.run(
                    guest,
                    self._port,
                    target[above.end() :],
                    life=(self._sandbox.id, self._sandbox.started_at),
                    place=partial(ports.keeping, self._sandbox),
                    idle_sec=ports.idle_sec,
                    over=revoked,
                )
