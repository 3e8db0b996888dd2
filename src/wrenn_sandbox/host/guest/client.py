"""Calls to the agent inside one guest, for one life of its machine."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import msgspec

from wrenn_sandbox.errors import AgentError, InvalidRequest
from wrenn_sandbox.wire.messages import Command, CommandResult, GuestMetrics

from .connect_rpc import (
    MALFORMED,
    Count,
    ExitCode,
    Percent,
    Pid,
    RpcError,
    envelope,
    messages,
    not_started,
    unary_error,
)
from .connection import ANSWER_SEC, KEEPALIVE_SEC, SILENT, Connect, Connection, GuestGone

GRACE_SEC: Final = 5.0
"""How long after its time limit a command may take to be started, or to be killed."""
CALL_SEC: Final = 120.0
"""How long an answer may take that asks for work on files, or on what a command has to take."""
_SMALL_ANSWER: Final = 256 * 1024
_IDLE_LIMIT: Final = 4
NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126


class Limits(msgspec.Struct, rename="camel", kw_only=True):
    """What all commands together may use: processes, and bytes of memory that they leave free."""

    processes: int
    reserved_memory: int


class Initialisation(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True):
    """The body of /init; `entropy` is base64, `timestamp` RFC 3339."""

    access_token: str
    timestamp: str = ""
    entropy: str = ""
    hostname: str = ""
    machine_id: str = ""
    generation: str = ""
    limits: Limits | None = None


class _Start(msgspec.Struct):
    pid: Pid


class _Data(msgspec.Struct):
    stdout: bytes = b""
    stderr: bytes = b""


class _End(msgspec.Struct, rename="camel"):
    exit_code: ExitCode = 0
    exited: bool = False
    status: str = ""
    duration_ms: float = -1.0


class _Event(msgspec.Struct):
    start: _Start | None = None
    data: _Data | None = None
    end: _End | None = None


class _Message(msgspec.Struct):
    event: _Event = msgspec.field(default_factory=_Event)


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


class _Output:
    """What is kept of one stream of output."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.truncated = False
        self._limit = limit

    def add(self, chunk: bytes) -> None:
        room = self._limit - len(self.data)
        self.data += chunk[:room]
        if len(chunk) > room:
            self.truncated = True


_DECODE_MESSAGE: Final = msgspec.json.Decoder(_Message)


class GuestClient:
    """Connections are kept between calls; `close` drops them with the machine's life.

    No request is sent twice: what the guest may have read, it may have done.
    """

    def __init__(self, connect: Connect, token: str | None) -> None:
        self._connect = connect
        self._token = token
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._closed = False

    async def health(self) -> None:
        """Raise `AgentError` unless the agent answers."""
        status, _ = await self.call("GET", "/health", seconds=CALL_SEC)
        if status != 204:
            raise AgentError("The sandbox did not answer.", detail=f"health status {status}")

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
            raise AgentError("The sandbox refused its identity.", detail=f"init status {status}")
        self._token = values.access_token

    async def set_clock(self, token: str, timestamp: str) -> None:
        """Tell the guest the time once more; everything else stays as it is."""
        await self.init(Initialisation(access_token=token, timestamp=timestamp))

    async def metrics(self) -> GuestMetrics:
        """Use of resources inside the guest."""
        status, body = await self.call("GET", "/metrics")
        try:
            if status != 200:
                raise AgentError("The sandbox gave no metrics.", detail=f"status {status}")
            return msgspec.convert(
                msgspec.json.decode(body, type=_Metrics), GuestMetrics, from_attributes=True
            )
        except MALFORMED as error:
            raise AgentError("The sandbox gave no metrics.", detail=str(error)) from error

    async def exec(self, command: Command, *, timeout: float, output_limit: int) -> CommandResult:
        """Run a command to its end or kill its process group after `timeout` seconds.

        Raises `InvalidRequest` where user, directory or arguments are not acceptable and
        `AgentError` where the guest fails.
        """
        began = time.monotonic()
        try:
            return await self._exec(command, timeout, output_limit)
        except RpcError as error:
            duration = round((time.monotonic() - began) * 1000)
            match error.rpc_code:
                case "not_found":
                    return _refused(NOT_FOUND, error, command, duration)
                case "permission_denied":
                    return _refused(NOT_EXECUTABLE, error, command, duration)
                case "invalid_argument":
                    raise InvalidRequest(error.message) from error
            raise

    async def _exec(self, command: Command, timeout: float, output_limit: int) -> CommandResult:
        stdout, stderr = _Output(output_limit), _Output(output_limit)
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        pid = 0
        timed_out = killed = False
        end: _End | None = None
        request = _start_request(command)

        def overdue() -> None:
            nonlocal timed_out
            timed_out = True
            limit.reschedule(loop.time() + (0.0 if pid else GRACE_SEC))

        timer = loop.call_later(timeout, overdue)
        try:
            async with (
                asyncio.timeout(None) as limit,
                self.stream("/process.Process/Start", request) as events,
            ):
                while (message := await anext(events, None)) is not None:
                    event = _decode(message).event
                    if event.start is not None:
                        pid = pid or event.start.pid
                        if timed_out:  # late, and to be killed
                            break
                    elif event.data is not None:
                        stdout.add(event.data.stdout)
                        stderr.add(event.data.stderr)
                    elif event.end is not None:
                        end = event.end
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            timer.cancel()
            if end is None and pid:
                killed = await asyncio.shield(self._kill(pid))
        duration = (time.monotonic() - began) * 1000
        if end is None and not (timed_out and pid):
            raise AgentError(SILENT if timed_out else "The sandbox ended its answer too early.")
        if end is not None and 0 <= end.duration_ms <= duration:
            duration = end.duration_ms
        return CommandResult(
            exit_code=end.exit_code if end is not None else 137,
            stdout=bytes(stdout.data),
            stderr=bytes(stderr.data),
            duration_ms=round(duration),
            truncated=stdout.truncated or stderr.truncated,
            timed_out=end is None,
            killed=killed,
        )

    async def _kill(self, pid: int) -> bool:
        """Whether the guest has answered that it did."""
        body = msgspec.json.encode({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"})
        try:
            async with asyncio.timeout(GRACE_SEC):
                status, _ = await self.call("POST", "/process.Process/SendSignal", body)
        except (TimeoutError, AgentError):
            return False
        return status == 200

    def close(self) -> None:
        """Drop every connection: calls under way end with `GuestGone`."""
        self._closed = True
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    @asynccontextmanager
    async def stream(self, target: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """The JSON messages that answer a streaming call with one JSON message."""
        async with self.connection() as connection:
            await connection.request(
                "POST",
                target,
                {
                    "Content-Type": "application/connect+json",
                    "Connect-Protocol-Version": "1",
                    "Keepalive-Ping-Interval": str(KEEPALIVE_SEC),
                    **self.credentials(),
                },
                envelope(body),
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
                asyncio.timeout(ANSWER_SEC if seconds is None else seconds) as time_limit,
                self.connection() as connection,
            ):
                await connection.request(method, target, headers, body)
                return connection.status, await connection.body(limit)
        except TimeoutError as error:
            if not time_limit.expired():
                raise
            raise GuestGone(SILENT, detail="no answer in time") from error

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

    def _require_life(self) -> None:
        if self._closed:
            raise GuestGone("The sandbox is not running any more.")

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
            connection.close()
        return None

    def credentials(self) -> dict[str, str]:
        """The headers that every request needs."""
        return {} if self._token is None else {"X-Access-Token": self._token}


def encoded_entropy(entropy: bytes) -> str:
    """Entropy in the form that /init takes."""
    return base64.b64encode(entropy).decode("ascii")


def process_config(command: Command) -> dict[str, object]:
    """A command in the form that Start takes."""
    process: dict[str, object] = {
        "cmd": command.cmd,
        "args": command.args,
        "envs": command.envs,
    }
    if command.cwd is not None:
        process["cwd"] = command.cwd
    if command.user is not None:
        process["user"] = command.user
    return process


def _start_request(command: Command) -> bytes:
    return msgspec.json.encode({"process": process_config(command), "stdin": False})


def _decode(message: bytes) -> _Message:
    try:
        return _DECODE_MESSAGE.decode(message)
    except MALFORMED as error:
        raise AgentError("The sandbox sent a malformed answer.", detail=str(error)) from error


def _refused(exit_code: int, error: RpcError, command: Command, duration_ms: int) -> CommandResult:
    return CommandResult(
        exit_code=exit_code,
        stdout=b"",
        stderr=f"{not_started(error, command)}\n".encode(),
        duration_ms=duration_ms,
    )
