"""Calls to the agent inside one guest, for one life of its machine."""

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import msgspec

from wrenn_sandbox.aio import beside
from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import GuestMetrics

from .connect_rpc import Count, Percent, decode, envelope, messages, refusal, unary_error
from .connection import (
    ANSWER_SEC,
    KEEPALIVE_SEC,
    SILENT,
    Connect,
    Connection,
    ConnectPort,
    GuestGone,
    GuestUnreachable,
)
from .tunnel import DirectTunnel, Tunnel

GRACE_SEC: Final = 5.0
"""How long after its time limit a command may take to be started, or to be killed."""
CALL_SEC: Final = 120.0
"""How long an answer may take that asks for work on files, or on what a command has to take."""
_SMALL_ANSWER: Final = 256 * 1024
_RPC_ANSWER: Final = 64 * 1024
_IDLE_LIMIT: Final = 4


class Limits(msgspec.Struct, rename="camel", kw_only=True):
    """What all commands together may use: processes, and bytes of memory that they leave free."""

    processes: int
    reserved_memory: int


class Initialisation(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True):
    """The body of /init; `entropy` is base64, `timestamp` RFC 3339.

    Without `env_vars` the guest keeps those that it has, and without `trusted_ca` that one; a
    certificate authority as PEM, or none at all as an empty text.
    """

    access_token: str
    timestamp: str = ""
    entropy: str = ""
    hostname: str = ""
    machine_id: str = ""
    generation: str = ""
    limits: Limits | None = None
    env_vars: dict[str, str] | None = None
    trusted_ca: str | None = None


class _Metrics(msgspec.Struct):
    cpu_count: Count
    cpu_used_pct: Percent
    mem_total: Count
    mem_used: Count
    disk_used: Count
    disk_total: Count
    mem_cache: Count = 0
    mem_limit: Count | None = None
    process_count: Count | None = None
    process_limit: Count | None = None


class GuestClient:
    """Connections are kept between calls; `close` drops them with the machine's life.

    No request is sent twice: what the guest may have read, it may have done.
    """

    def __init__(
        self, connect: Connect, token: str | None, connect_port: ConnectPort | None = None
    ) -> None:
        """`connect` is to the agent, `connect_port` to other ports, where that can be done."""
        self._connect = connect
        self._token = token
        self._connect_port = connect_port
        self._direct_ports: set[int] = set()
        """Reached without the agent when last tried."""
        self._agents_ports: set[int] = set()
        """Not reached, though the agent said that they listen."""
        self._idle: list[Connection] = []
        self._busy: set[Connection | Tunnel | DirectTunnel] = set()
        self._closed = False

    async def health(self) -> None:
        """Raise `AgentError` unless the agent answers."""
        status, _ = await self.call("GET", "/health", seconds=CALL_SEC)
        if status != 204:
            raise AgentError("The sandbox did not answer", detail=f"health status {status}")

    async def answer(self) -> None:
        """Wait until the agent says anything, on a new connection; raises `GuestUnreachable`."""
        self._require_life()
        connection = await Connection.open(self._connect)
        self._busy.add(connection)
        try:
            with suppress(GuestGone):
                await connection.request("GET", "/health", self.credentials())
        finally:
            self._busy.discard(connection)
            connection.close()

    async def init(self, values: Initialisation) -> None:
        """Give the guest its identity, clock, entropy and token; later calls use the new token."""
        body = msgspec.json.encode(values)
        status, _ = await self.call("POST", "/init", body, seconds=CALL_SEC)
        if status != 204:
            raise AgentError("The sandbox refused its identity", detail=f"init status {status}")
        self._token = values.access_token

    async def set_clock(self, token: str, timestamp: str) -> None:
        """Tell the guest the time once more; everything else stays as it is."""
        await self.init(Initialisation(access_token=token, timestamp=timestamp))

    async def trust(self, token: str, ca: str) -> None:
        """Have new commands trust this authority, or none; everything else stays as it is."""
        await self.init(Initialisation(access_token=token, trusted_ca=ca))

    async def metrics(self) -> GuestMetrics:
        """Use of resources inside the guest."""
        status, body = await self.call("GET", "/metrics")
        if status != 200:
            raise AgentError("The sandbox gave no metrics", detail=f"status {status}")
        return msgspec.convert(decode(body, _Metrics), GuestMetrics, from_attributes=True)

    def close(self) -> None:
        """Drop every connection: calls under way end with `GuestGone`."""
        self._closed = True
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    @asynccontextmanager
    async def stream(
        self, method: str, message: Mapping[str, object]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The JSON messages that answer a streaming call with one message."""
        async with self.connection() as connection:
            await connection.request(
                "POST",
                f"/{method}",
                {
                    "Content-Type": "application/connect+json",
                    "Connect-Protocol-Version": "1",
                    "Keepalive-Ping-Interval": str(KEEPALIVE_SEC),
                    **self.credentials(),
                },
                envelope(msgspec.json.encode(message)),
                seconds=ANSWER_SEC,
            )
            if connection.status != 200:
                raise unary_error(connection.status, await connection.body(_SMALL_ANSWER))
            yield messages(connection.chunks())

    async def call(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        limit: int = _SMALL_ANSWER,
        seconds: float | None = None,
    ) -> tuple[int, bytes]:
        """Status and whole body, `limit` bytes at most, of the answer to a request.

        `body` is JSON. Raises `AgentError`, also where all that takes more than `seconds`, by
        default `ANSWER_SEC`.
        """
        headers = self.credentials()
        if body:
            headers["Content-Type"] = "application/json"
        try:
            async with (
                asyncio.timeout(patience(ANSWER_SEC if seconds is None else seconds)) as time_limit,
                self.connection() as connection,
            ):
                await connection.request(method, target, headers, body)
                return connection.status, await connection.body(limit)
        except TimeoutError as error:
            if not time_limit.expired():
                raise
            raise GuestGone(SILENT, detail="no answer in time") from error

    async def rpc(
        self,
        method: str,
        message: Mapping[str, object],
        *,
        limit: int = _RPC_ANSWER,
        seconds: float | None = None,
    ) -> bytes:
        """The body of the answer to a unary call, within the bounds of `call`.

        Raises the platform's error where the agent refuses it.
        """
        body = msgspec.json.encode(message)
        status, body = await self.call("POST", f"/{method}", body, limit=limit, seconds=seconds)
        if status != 200:
            raise refusal(unary_error(status, body), status)
        return body

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection for one exchange; it is kept afterwards when the exchange is complete."""
        self._require_life()
        connection = self._take_idle() or await Connection.open(self._connect)
        self._busy.add(connection)
        try:
            self._require_life()
            yield connection
        finally:
            self._busy.discard(connection)
            if connection.reusable and not self._closed and len(self._idle) < _IDLE_LIMIT:
                self._idle.append(connection)
            else:
                connection.close()

    @asynccontextmanager
    async def tunnel(
        self, port: int, sent: AsyncIterator[bytes]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """See `wire.guest.Guest.connect`."""
        tunnel = await self._tunnel_to(port)
        try:
            async with beside(tunnel.carry(sent)):
                yield tunnel.pieces()
        finally:
            self._let_go(tunnel)

    async def _tunnel_to(self, port: int) -> Tunnel | DirectTunnel:
        """One that `close` cuts from now on.

        The agent leads to every port, but it takes part in all that is sent then. It is done
        without where it says that the port is open to all, and that it will break what is left of
        such connections in a later life of this guest, as it does with its own.
        """
        if port in self._direct_ports and (direct := await self._direct_to(port)):
            return direct
        ask = self._connect_port is not None and port not in self._agents_ports
        self._require_life()
        tunnel = await Tunnel.open(self._connect)
        self._hold(tunnel)
        try:
            if await tunnel.lead_to(port, self.credentials(), or_direct=ask):
                return tunnel
        except BaseException:
            self._let_go(tunnel)
            raise
        self._let_go(tunnel)
        if direct := await self._direct_to(port):
            self._direct_ports.add(port)
            return direct
        self._agents_ports.add(port)
        return await self._tunnel_to(port)

    async def _direct_to(self, port: int) -> DirectTunnel | None:
        assert self._connect_port is not None
        self._require_life()
        try:
            tunnel = await DirectTunnel.open(partial(self._connect_port, port))
        except GuestUnreachable:
            self._direct_ports.discard(port)
            return None
        self._hold(tunnel)
        return tunnel

    def _hold(self, tunnel: Tunnel | DirectTunnel) -> None:
        self._busy.add(tunnel)
        if self._closed:
            self._let_go(tunnel)
        self._require_life()

    def _let_go(self, tunnel: Tunnel | DirectTunnel) -> None:
        self._busy.discard(tunnel)
        tunnel.close()

    def _require_life(self) -> None:
        if self._closed:
            raise GuestGone("The sandbox is not running any more")

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
            connection.close()
        return None

    @property
    def token(self) -> str:
        """What the agent wants as `X-Access-Token`; empty for one that has not been told any."""
        return self._token or ""

    def credentials(self) -> dict[str, str]:
        """The headers that every request needs."""
        return {} if self._token is None else {"X-Access-Token": self._token}


def encoded_entropy(entropy: bytes) -> str:
    """Entropy in the form that /init takes."""
    return base64.b64encode(entropy).decode("ascii")
