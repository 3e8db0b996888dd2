"""`GET /metrics` in the text format of Prometheus, for those who may read it."""

import hmac

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response

from wrenn_sandbox.control.metrics import Metrics
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.errors import Forbidden, Unauthorized
from wrenn_sandbox.wire.host import Host

from .forwarded import parse_address
from .middleware import client_address


def _require_permission(request: Request, token: SecretStr | None) -> None:
    if token is None:
        address = parse_address(client_address(request.scope))
        if address is None or not address.is_loopback:
            raise Forbidden("Metrics are served to this host only; set WRENN_METRICS_TOKEN")
        return
    given = request.headers.get("authorization", "")
    wanted = f"Bearer {token.get_secret_value()}"
    if not hmac.compare_digest(given.encode("utf-8"), wanted.encode("utf-8")):
        raise Unauthorized("Metrics need the token of WRENN_METRICS_TOKEN as a bearer token")


def metrics_router(
    metrics: Metrics, store: Store, host: Host, token: SecretStr | None
) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", include_in_schema=False)
    async def read_metrics(request: Request) -> Response:
        _require_permission(request, token)
        return Response(await metrics.text(store, host), media_type=CONTENT_TYPE_LATEST)

    return router
