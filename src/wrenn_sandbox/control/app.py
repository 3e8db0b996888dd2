"""The control plane as an ASGI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from argon2 import PasswordHasher
from fastapi import FastAPI
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from wrenn_sandbox.control.api.body import ParseTurns
from wrenn_sandbox.control.api.cors import Cors
from wrenn_sandbox.control.api.docs import add_docs
from wrenn_sandbox.control.api.errors import add_error_handlers
from wrenn_sandbox.control.api.forwarded import Forwarded, TrustedProxies
from wrenn_sandbox.control.api.metrics import metrics_router
from wrenn_sandbox.control.api.middleware import (
    BodyLimit,
    Concurrency,
    Heads,
    RequestContext,
    RequestPlaces,
    ServerErrors,
)
from wrenn_sandbox.edge.router import Router
from wrenn_sandbox.errors import NotFound
from wrenn_sandbox.settings import ControlSettings
from wrenn_sandbox.wire.host import Host

from .api import (
    api_keys,
    archive,
    auth,
    capsules,
    event_stream,
    events,
    exec,
    files,
    forks,
    health,
    logs,
    network,
    oauth,
    ports,
    processes,
    sandbox_metrics,
    sandboxes,
    secrets,
    snapshots,
    usage,
    webhooks,
)
from .api.streams import exec as exec_stream
from .api.streams import pty
from .clock import Clock, utc_now
from .e2b.errors import ErrorForm
from .e2b.routes import ROUTERS as E2B_ROUTERS
from .wiring import ControlPlane

_ROUTERS = (
    auth.router,
    oauth.router,
    api_keys.router,
    sandboxes.router,
    forks.router,
    exec.router,
    events.router,
    event_stream.router,
    network.router,
    ports.router,
    files.router,
    archive.router,
    exec_stream.router,
    processes.router,
    sandbox_metrics.router,
    logs.router,
    pty.router,
    snapshots.router,
    webhooks.router,
    secrets.router,
    usage.router,
    health.router,
)
_LOCAL_URL = "http://localhost:8080"


async def _no_such_socket(websocket: WebSocket) -> None:
    raise NotFound("There is no such route; see /docs")


def create_app(
    settings: ControlSettings,
    host: Host,
    *,
    clock: Clock = utc_now,
    hasher: PasswordHasher | None = None,
) -> FastAPI:
    """An application that serves the API with `host` as its machine.

    Its lifespan brings the database up to date and runs the background tasks; `host` is neither
    started nor closed by it. `hasher` sets the cost of password hashes.
    """
    plane = ControlPlane(settings, host, clock=clock, hasher=hasher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with plane.running() as services:
            app.state.services = services
            yield

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.plane = plane
    app.state.parsing_turns = ParseTurns()
    for router in _ROUTERS:
        # include_router would analyze each of these routes again for every application
        app.router.routes.extend(router.routes)
    app.include_router(metrics_router(plane.metrics, plane.store, host, settings.metrics_token))
    add_docs(app, settings.public_url or _LOCAL_URL)
    for router in (*E2B_ROUTERS, capsules.router):
        app.router.routes.extend(router.routes)
    app.router.routes.append(WebSocketRoute("/{path:path}", _no_such_socket))
    add_error_handlers(app)
    app.add_middleware(Heads)
    exceptions = (*files.BODY_LIMITS, *archive.BODY_LIMITS, *ports.BODY_LIMITS)
    app.add_middleware(BodyLimit, limit=settings.body_limit_bytes, exceptions=exceptions)
    app.add_middleware(ServerErrors)
    places = RequestPlaces(settings.max_connections_per_address)
    app.add_middleware(Concurrency, places=places)
    app.add_middleware(ErrorForm)
    app.add_middleware(capsules.Capsules)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(RequestContext, metrics=plane.metrics)
    app.add_middleware(Router, domain=settings.domain, place=places.take)
    if settings.trusted_proxies:
        app.add_middleware(Forwarded, trusted=TrustedProxies(settings.trusted_proxies))
    return app
