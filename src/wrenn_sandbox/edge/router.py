"""Requests for ports of sandboxes go to them; everything else goes to the API."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from hmac import compare_digest
from math import ceil
from typing import Final

import structlog
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from wrenn_sandbox.control.service.ports import PortService
from wrenn_sandbox.control.store.sandboxes import Exposed
from wrenn_sandbox.errors import (
    AgentError,
    Forbidden,
    InternalError,
    InvalidState,
    NotFound,
    PortError,
    WrennError,
)
from wrenn_sandbox.wire.guest import AGENT_PORT

from . import agent
from .address import Address, address_of
from .exchange import Exchange, target_of
from .head import TRAFFIC_TOKEN, Fields, Origin, client_of

_log = structlog.get_logger("wrenn_sandbox.access")
Place = Callable[[Scope], AbstractContextManager[None]]
"""A place for a request among those of its client; raises `RateLimited`."""

_NOT_FOUND: Final = "The sandbox was not found"
"""Clients look for these words, and for "port is not open"."""


class Router:
    """Stands in front of `app`, whose state has the services by the time of the first request."""

    def __init__(self, app: ASGIApp, *, domain: str, place: Place) -> None:
        self._app = app
        self._domain = domain
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            address = address_of(scope["headers"], self._domain, scope["raw_path"])
        except WrennError as error:
            await _refusal(error)(scope, receive, send)
            return
        if address is None:
            await self._app(scope, receive, send)
        else:
            ports: PortService = scope["app"].state.services.ports
            await _Visit(ports, self._place, address, scope, receive, send).make()


class _Visit:
    """A request to an address of its own."""

    def __init__(
        self,
        ports: PortService,
        place: Place,
        address: Address,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._ports = ports
        self._place = place
        self._address = address
        self._scope = scope
        self._receive = receive
        self._send = send
        self._fields = dict(scope["headers"])
        self._status = 0

    async def make(self) -> None:
        """Answer it, whatever happens, and log that; never what comes after the question mark."""
        began = time.perf_counter()
        try:
            with self._place(self._scope):
                await self._visit()
        except WrennError as error:
            if error.detail:
                _log.info("port not reached", error=error.message, detail=error.detail)
            await self._refuse(error)
        except Exception:
            _log.exception("request to a port failed")
            await self._refuse(InternalError("Something went wrong on the server"))
        finally:
            _log.info(
                "request to a port",
                method=self._scope["method"],
                sandbox_id=self._address.sandbox_id[:64],
                port=self._address.port,
                client=client_of(self._scope),
                status=self._status,
                ms=round((time.perf_counter() - began) * 1000, 2),
            )

    async def _refuse(self, error: WrennError) -> None:
        if self._status:
            raise error
        self._status = error.status
        await _refusal(error, self._address)(self._scope, self._receive, self._send)

    async def _visit(self) -> None:
        with _not_found():
            sandbox = await self._ports.find(self._address.sandbox_id)
        target, trusted = self._admit(sandbox)
        with _not_found():
            async with self._ports.using(sandbox, trusted=trusted) as guest:
                extra: Fields = []
                if self._address.port == AGENT_PORT:
                    token = await guest.agent_token() if trusted else ""
                    extra = [(agent.TOKEN_HEADER, token.encode("ascii"))]
                own = self._address.own_origin
                origin = Origin(client_of(self._scope), self._scope["scheme"], own)
                exchange = Exchange(self._scope, self._receive, self._send, origin)
                try:
                    await exchange.run(
                        guest,
                        self._address.port,
                        target,
                        life=(sandbox.id, sandbox.started_at),
                        place=partial(self._ports.keeping, sandbox),
                        extra=extra,
                        idle_sec=self._ports.idle_sec,
                    )
                finally:
                    self._status = exchange.status

    def _admit(self, sandbox: Exposed) -> tuple[bytes, bool]:
        """What to ask the guest for, and whether the caller has shown a credential."""
        if self._address.port == AGENT_PORT:
            return agent.checked(
                self._scope["method"],
                self._scope["raw_path"],
                self._scope["query_string"],
                self._fields.get(agent.TOKEN_HEADER),
                self._ports.agent_token(sandbox.id),
                time.time(),
            )
        if sandbox.private_ports:
            given = self._fields.get(TRAFFIC_TOKEN, b"")
            if not compare_digest(given, self._ports.traffic_token(sandbox.id).encode("ascii")):
                name = TRAFFIC_TOKEN.decode("ascii")
                raise Forbidden(f"The ports of this sandbox are private: send its token as {name}")
        return target_of(self._scope), sandbox.private_ports


@contextmanager
def _not_found() -> Iterator[None]:
    """For whoever comes to an address, a sandbox that does not run is not there."""
    try:
        yield
    except PortError:
        raise
    except NotFound as error:
        raise AgentError(_NOT_FOUND) from error
    except InvalidState as error:
        raise AgentError(f"{_NOT_FOUND} running: {error.message}") from error


def _refusal(error: WrennError, address: Address | None = None) -> JSONResponse:
    """An answer in the form that clients of sandboxes' addresses know."""
    content: dict[str, str | int] = {"code": error.status, "message": error.message}
    if address is not None:
        content |= {"sandboxId": address.sandbox_id, "port": address.port}
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(ceil(error.retry_after))
    return JSONResponse(content, error.status, headers)
