"""Commands of one guest that are followed while they run, through its agent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from wrenn_sandbox.errors import InvalidRequest, WrennError
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import (
    Channel,
    Command,
    CommandResult,
    Ended,
    Output,
    ProcessEvent,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
)

from .client import CALL_SEC, GRACE_SEC, GuestClient
from .connect_rpc import ExitCode, Pid, RpcError, decode, malformed, not_started, refusal
from .connection import ANSWER_SEC, SILENT, GuestGone

INPUT_PIECE: Final = 256 * 1024
"""Bytes of input that one call carries."""
NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126

_LIST_BYTES: Final = 4 * 1024 * 1024
_LIST_WORDS: Final = 100_000
"""Processes and their arguments together, all of which came in through the API."""
_SERVICE: Final = "process.Process/"
_NOT_STARTED: Final = {"not_found": NOT_FOUND, "permission_denied": NOT_EXECUTABLE}


class _Start(msgspec.Struct):
    pid: Pid


class _Data(msgspec.Struct):
    stdout: bytes = b""
    stderr: bytes = b""
    pty: bytes = b""


class _End(msgspec.Struct, rename="camel"):
    exit_code: ExitCode = 0
    duration_ms: float = -1.0


class _Event(msgspec.Struct):
    start: _Start | None = None
    data: _Data | None = None
    end: _End | None = None


class _Message(msgspec.Struct):
    event: _Event = msgspec.field(default_factory=_Event)


class _Config(msgspec.Struct):
    cmd: str
    args: list[str] = []


class _Process(msgspec.Struct):
    config: _Config
    pid: Pid
    tag: str = ""


class _Processes(msgspec.Struct):
    processes: list[_Process] = []


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


class GuestProcesses:
    """Calls raise what `Guest` says of them."""

    def __init__(self, client: GuestClient) -> None:
        self._client = client

    async def exec(self, command: Command, *, timeout: float, output_limit: int) -> CommandResult:
        kept = {each: _Output(output_limit) for each in Channel}
        loop = asyncio.get_running_loop()
        began = loop.time()
        pid: int | None = None
        timed_out = killed = False
        ended: Ended | None = None

        def overdue() -> None:
            nonlocal timed_out
            timed_out = True
            limit.reschedule(loop.time() + (0.0 if pid else patience(GRACE_SEC)))

        timer = loop.call_later(timeout, overdue)
        try:
            async with asyncio.timeout(None) as limit, self.start_process(command) as stream:
                pid = stream.pid
                if not timed_out or pid is None:  # else late, and to be killed
                    async for event in stream.events:
                        if isinstance(event, Ended):
                            ended = event
                        else:
                            kept[event.channel].add(event.data)
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            timer.cancel()
            if ended is None and pid:
                killed = await asyncio.shield(self._kill(pid))
        duration = (loop.time() - began) * 1000
        if ended is None and not pid:
            raise GuestGone(SILENT, detail="no start event")
        if ended is not None and ended.duration_ms is not None:
            duration = min(duration, ended.duration_ms)
        stdout, stderr = kept[Channel.STDOUT], kept[Channel.STDERR]
        return CommandResult(
            exit_code=ended.exit_code if ended is not None else 137,
            stdout=bytes(stdout.data),
            stderr=bytes(stderr.data),
            duration_ms=round(duration),
            truncated=stdout.truncated or stderr.truncated,
            timed_out=ended is None,
            killed=killed,
        )

    async def _kill(self, pid: int) -> bool:
        """Whether the guest has answered that it did."""
        try:
            async with asyncio.timeout(patience(GRACE_SEC)):
                await self.signal_process(ProcessRef(pid=pid), ProcessSignal.KILL)
        except (TimeoutError, WrennError):
            return False
        return True

    @asynccontextmanager
    async def start_process(
        self,
        command: Command,
        *,
        tag: str | None = None,
        stdin: bool = False,
        terminal: TerminalSize | None = None,
        own: bool = False,
    ) -> AsyncIterator[ProcessStream]:
        """With `own` the command is a program that comes with the agent."""
        config = _config(command)
        if own:
            config["program"] = command.cmd
        message: dict[str, object] = {"process": config, "stdin": stdin}
        if tag is not None:
            message["tag"] = tag
        if terminal is not None:
            message["pty"] = {"size": terminal}
        async with self._client.stream(_SERVICE + "Start", message) as answer:
            try:
                stream = await _followed(answer)
            except RpcError as error:
                code = _NOT_STARTED.get(error.rpc_code)
                if code is None:
                    raise refusal(error) from error
                stream = ProcessStream(None, _not_started(not_started(error, command), code))
            yield stream

    async def start_detached(self, command: Command, *, tag: str) -> int:
        message = {"process": _config(command), "stdin": False, "tag": tag, "detached": True}
        async with self._client.stream(_SERVICE + "Start", message) as answer:
            try:
                stream = await _followed(answer)
                assert stream.pid is not None
            except RpcError as error:
                if error.rpc_code in _NOT_STARTED:
                    raise InvalidRequest(not_started(error, command)) from error
                raise refusal(error) from error
            return stream.pid

    @asynccontextmanager
    async def attach_process(
        self, process: ProcessRef, *, replay: bool
    ) -> AsyncIterator[ProcessStream]:
        message = {"process": _selector(process), "replay": replay}
        async with self._client.stream(_SERVICE + "Connect", message) as answer:
            try:
                stream = await _followed(answer)
            except RpcError as error:
                raise refusal(error) from error
            yield stream

    async def processes(self) -> list[ProcessInfo]:
        answer = await self._client.rpc(_SERVICE + "List", {}, limit=_LIST_BYTES)
        found = decode(answer, _Processes).processes
        if len(found) + sum(len(each.config.args) for each in found) > _LIST_WORDS:
            raise malformed("too many processes")
        return [
            ProcessInfo(
                pid=each.pid,
                cmd=each.config.cmd,
                args=tuple(each.config.args),
                tag=each.tag or None,
            )
            for each in found
        ]

    async def send_input(self, pid: int, data: bytes, *, terminal: bool) -> None:
        kind = "pty" if terminal else "stdin"
        for start in range(0, len(data), INPUT_PIECE):
            piece = data[start : start + INPUT_PIECE]
            message = {"process": {"pid": pid}, "input": {kind: piece}}
            await self._client.rpc(_SERVICE + "SendInput", message, seconds=CALL_SEC)

    async def close_input(self, pid: int) -> None:
        await self._client.rpc(_SERVICE + "CloseStdin", {"process": {"pid": pid}})

    async def resize_terminal(self, pid: int, size: TerminalSize) -> None:
        message = {"process": {"pid": pid}, "pty": {"size": size}}
        await self._client.rpc(_SERVICE + "Update", message)

    async def signal_process(self, process: ProcessRef, signal: ProcessSignal) -> None:
        message = {"process": _selector(process), "signal": f"SIGNAL_{signal.value}"}
        await self._client.rpc(_SERVICE + "SendSignal", message)


def _config(command: Command) -> dict[str, object]:
    """A command in the form that Start takes."""
    config: dict[str, object] = {"cmd": command.cmd, "args": command.args, "envs": command.envs}
    if command.cwd is not None:
        config["cwd"] = command.cwd
    if command.user is not None:
        config["user"] = command.user
    return config


def _selector(process: ProcessRef) -> dict[str, object]:
    return {"tag": process.tag} if process.pid is None else {"pid": process.pid}


async def _followed(answer: AsyncIterator[bytes]) -> ProcessStream:
    try:
        async with asyncio.timeout(patience(ANSWER_SEC)) as limit:
            async for message in answer:
                start = decode(message, _Message).event.start
                if start is not None:
                    return ProcessStream(start.pid, _events(answer))
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise GuestGone(SILENT, detail="no start event") from error
    raise malformed("no start event")


async def _events(answer: AsyncIterator[bytes]) -> AsyncIterator[ProcessEvent]:
    ended = False
    try:
        async for message in answer:
            event = decode(message, _Message).event
            if ended and (event.data is not None or event.end is not None):
                raise malformed("something after the end")
            if event.data is not None:
                for channel, data in (
                    (Channel.STDOUT, event.data.stdout),
                    (Channel.STDERR, event.data.stderr),
                    (Channel.TERMINAL, event.data.pty),
                ):
                    if data:
                        yield Output(channel, data)
            elif event.end is not None:
                ended = True
                took = event.end.duration_ms
                yield Ended(event.end.exit_code, took if took >= 0 else None)
    except RpcError as error:
        raise refusal(error) from error
    if not ended:
        raise malformed("no end event")


async def _not_started(reason: str, code: int) -> AsyncIterator[ProcessEvent]:
    yield Output(Channel.STDERR, f"{reason}\n".encode())
    yield Ended(code)
