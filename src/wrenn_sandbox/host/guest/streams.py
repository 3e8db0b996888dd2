"""Commands of one guest that are followed while they run, through its agent."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from wrenn_sandbox.errors import AgentError, InvalidRequest
from wrenn_sandbox.wire.messages import (
    Channel,
    Command,
    Ended,
    Output,
    ProcessEvent,
    ProcessInfo,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
)

from .client import CALL_SEC, NOT_EXECUTABLE, NOT_FOUND, GuestClient, process_config
from .connect_rpc import MALFORMED, ExitCode, Pid, RpcError, not_started, refusal, unary_error
from .connection import ANSWER_SEC, SILENT, GuestGone

INPUT_PIECE: Final = 256 * 1024
"""Bytes of input that one call carries."""

_ANSWER_BYTES: Final = 64 * 1024
_LIST_BYTES: Final = 4 * 1024 * 1024
_LIST_WORDS: Final = 100_000
"""Processes and their arguments together, all of which came in through the API."""
_SERVICE: Final = "/process.Process/"
_NOT_STARTED: Final = {"not_found": NOT_FOUND, "permission_denied": NOT_EXECUTABLE}


class _Start(msgspec.Struct):
    pid: Pid


class _Data(msgspec.Struct):
    stdout: bytes = b""
    stderr: bytes = b""
    pty: bytes = b""


class _End(msgspec.Struct, rename="camel"):
    exit_code: ExitCode = 0


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


_DECODE: Final = msgspec.json.Decoder(_Message)


class GuestProcesses:
    """Calls raise what `Host` says of them."""

    def __init__(self, client: GuestClient) -> None:
        self._client = client

    @asynccontextmanager
    async def start(
        self,
        command: Command,
        *,
        tag: str | None,
        stdin: bool,
        terminal: TerminalSize | None,
        own: bool = False,
    ) -> AsyncIterator[ProcessStream]:
        """With `own` the command is a program that comes with the agent."""
        config = process_config(command)
        if own:
            config["program"] = command.cmd
        message: dict[str, object] = {"process": config, "stdin": stdin}
        if tag is not None:
            message["tag"] = tag
        if terminal is not None:
            message["pty"] = {"size": terminal}
        async with self._client.stream(_SERVICE + "Start", msgspec.json.encode(message)) as answer:
            try:
                stream = await _followed(answer)
            except RpcError as error:
                code = _NOT_STARTED.get(error.rpc_code)
                if code is None:
                    raise refusal(error) from error
                stream = ProcessStream(None, _not_started(not_started(error, command), code))
            yield stream

    async def start_detached(self, command: Command, *, tag: str) -> int:
        message = {
            "process": process_config(command),
            "stdin": False,
            "tag": tag,
            "detached": True,
        }
        async with self._client.stream(_SERVICE + "Start", msgspec.json.encode(message)) as answer:
            try:
                stream = await _followed(answer)
                assert stream.pid is not None
            except RpcError as error:
                if error.rpc_code in _NOT_STARTED:
                    raise InvalidRequest(not_started(error, command)) from error
                raise refusal(error) from error
            return stream.pid

    @asynccontextmanager
    async def attach(self, process: ProcessRef, *, replay: bool) -> AsyncIterator[ProcessStream]:
        message = msgspec.json.encode({"process": _selector(process), "replay": replay})
        async with self._client.stream(_SERVICE + "Connect", message) as answer:
            try:
                stream = await _followed(answer)
            except RpcError as error:
                raise refusal(error) from error
            yield stream

    async def list(self) -> list[ProcessInfo]:
        answer = await self._call("List", {}, _LIST_BYTES)
        try:
            found = msgspec.json.decode(answer, type=_Processes).processes
        except MALFORMED as error:
            raise _malformed(str(error)) from error
        if len(found) + sum(len(each.config.args) for each in found) > _LIST_WORDS:
            raise _malformed("too many processes")
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
            await self._call("SendInput", message, seconds=CALL_SEC)

    async def close_input(self, pid: int) -> None:
        await self._call("CloseStdin", {"process": {"pid": pid}})

    async def resize(self, pid: int, size: TerminalSize) -> None:
        await self._call("Update", {"process": {"pid": pid}, "pty": {"size": size}})

    async def signal(self, process: ProcessRef, signal: ProcessSignal) -> None:
        name = f"SIGNAL_{signal.value}"
        await self._call("SendSignal", {"process": _selector(process), "signal": name})

    async def _call(
        self,
        method: str,
        message: Mapping[str, object],
        limit: int = _ANSWER_BYTES,
        seconds: float | None = None,
    ) -> bytes:
        body = msgspec.json.encode(message)
        status, body = await self._client.call(
            "POST", _SERVICE + method, body, limit=limit, seconds=seconds
        )
        if status != 200:
            raise refusal(unary_error(status, body), status)
        return body


def _selector(process: ProcessRef) -> dict[str, object]:
    return {"tag": process.tag} if process.pid is None else {"pid": process.pid}


async def _followed(answer: AsyncIterator[bytes]) -> ProcessStream:
    try:
        async with asyncio.timeout(ANSWER_SEC) as limit:
            async for message in answer:
                start = _decode(message).start
                if start is not None:
                    return ProcessStream(start.pid, _events(answer))
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise GuestGone(SILENT, detail="no start event") from error
    raise _malformed("no start event")


async def _events(answer: AsyncIterator[bytes]) -> AsyncIterator[ProcessEvent]:
    ended = False
    try:
        async for message in answer:
            event = _decode(message)
            if ended and (event.data is not None or event.end is not None):
                raise _malformed("something after the end")
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
                yield Ended(event.end.exit_code)
    except RpcError as error:
        raise refusal(error) from error
    if not ended:
        raise _malformed("no end event")


async def _not_started(reason: str, code: int) -> AsyncIterator[ProcessEvent]:
    yield Output(Channel.STDERR, f"{reason}\n".encode())
    yield Ended(code)


def _decode(message: bytes) -> _Event:
    try:
        return _DECODE.decode(message).event
    except MALFORMED as error:
        raise _malformed(str(error)) from error


def _malformed(detail: str) -> AgentError:
    return AgentError("The sandbox sent a malformed answer.", detail=detail)
