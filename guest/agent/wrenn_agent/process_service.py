"""The RPC service `process.Process`."""

from __future__ import annotations

import os
import signal
import time

from . import events, fields
from .auth import Auth
from .connect import StreamCall
from .environment import Environment
from .errors import InvalidArgument
from .exchange import Exchange
from .fields import Message
from .loop import Loop
from .process import Process
from .processes import Processes
from .spawn import Command, own_program

_FLUSH_BYTES = 256 * 1024
KILL_SECONDS = 2.0
"""How long the answer to SIGKILL waits for the end: a process can be in the kernel, or stopped on
output that nobody reads."""
_MAX_TERMINAL_SIDE = 65535
_BASH, _SH = "/bin/bash", "/bin/sh"
_SIGNALS: dict[str | int, int] = {
    "SIGNAL_SIGKILL": signal.SIGKILL,
    "SIGNAL_SIGTERM": signal.SIGTERM,
    9: signal.SIGKILL,
    15: signal.SIGTERM,
}


class ProcessService:
    """Methods of `process.Process`; each takes and returns messages as in the contract."""

    def __init__(
        self, loop: Loop, processes: Processes, auth: Auth, environment: Environment
    ) -> None:
        self._loop = loop
        self._processes = processes
        self._auth = auth
        self._environment = environment

    async def start(self, call: StreamCall) -> None:
        """Start a command and follow it, unless it is `detached`; it outlives the call."""
        message = await call.receive_request()
        command = self._command(call.exchange, message)
        process = self._processes.start(command, fields.text(message, "tag"))
        if fields.flag(message, "detached"):
            call.put(events.started(process.pid))
            return
        await self._follow(call, process, from_start=True)

    async def connect(self, call: StreamCall) -> None:
        """Follow a running command, from now on or (`replay`) with what was said before."""
        message = await call.receive_request()
        replay = fields.flag(message, "replay")
        process = self._select(message, ended_too=replay)
        await self._follow(call, process, from_start=replay)

    async def list(self, _exchange: Exchange, _message: Message) -> Message:
        """All running commands."""
        return {"processes": [_describe(process) for process in self._processes.running()]}

    async def send_signal(self, _exchange: Exchange, message: Message) -> Message:
        """SIGTERM to the process group, SIGKILL to all that the command has started.

        What is killed is gone when this is answered.
        """
        wanted = message.get("signal")
        number = _SIGNALS.get(wanted) if isinstance(wanted, str | int) else None
        if number is None:
            raise InvalidArgument("signal must be SIGNAL_SIGKILL or SIGNAL_SIGTERM")
        process = self._select(message)
        self._processes.signal(process, number)
        if number == signal.SIGKILL:
            await self._end_of(process)
        return {}

    async def send_input(self, _exchange: Exchange, message: Message) -> Message:
        """Write to stdin or the terminal; answers when the process's pipe has taken all of it."""
        await _write(self._select(message), message)
        return {}

    async def stream_input(self, call: StreamCall) -> None:
        """Write what a client streams."""
        process: Process | None = None
        while (message := await call.receive()) is not None:
            start, data = fields.nested(message, "start"), fields.nested(message, "data")
            if start is not None:
                process = self._select(start)
            elif data is not None:
                if process is None:
                    raise InvalidArgument("the first message must be `start`")
                await _write(process, data)
        call.put(b"{}")

    async def close_stdin(self, _exchange: Exchange, message: Message) -> Message:
        """Close stdin after everything that was sent to it."""
        await self._select(message).close_input()
        return {}

    async def update(self, _exchange: Exchange, message: Message) -> Message:
        """Resize the terminal."""
        process = self._select(message)
        size = _terminal_size(message)
        if size is not None:
            process.resize(size)
        return {}

    async def _follow(self, call: StreamCall, process: Process, from_start: bool) -> None:
        output = process.output
        reader = output.attach(from_start)
        told = False
        try:
            call.put(events.started(process.pid))
            await call.flush()
            call.keep_alive(output.changed)
            while True:
                pieces = output.take(reader, _FLUSH_BYTES)
                for channel, data in pieces:
                    call.put(events.data(channel, data))
                if process.ended and not output.has_more(reader):
                    call.put(events.ended(process))
                    await call.finish()
                    told = True
                    return
                if not pieces and call.keepalive_due:
                    call.put(events.KEEPALIVE)
                await call.flush()
                process.resume()
                if not pieces:
                    await output.changed.wait()
        finally:
            self._processes.release(process, reader, told)

    async def _end_of(self, process: Process) -> None:
        changed = process.output.changed
        deadline = time.monotonic() + KILL_SECONDS
        timer = self._loop.call_later(KILL_SECONDS, changed.notify)
        try:
            while not process.ended and time.monotonic() < deadline:
                await changed.wait()
        finally:
            timer.cancel()

    def _command(self, exchange: Exchange, message: Message) -> Command:
        config = fields.nested(message, "process")
        if config is None:
            raise InvalidArgument("process is missing")
        name, own = fields.text(config, "cmd"), fields.text(config, "program")
        if not name and not own:
            raise InvalidArgument("process.cmd is empty")
        begin = own_program(own) if own else [_shell(name)]
        account = fields.text(config, "user")
        user = self._auth.user(account) if account else self._auth.user_of(exchange)
        size = _terminal_size(message)
        argv = [*begin, *fields.texts(config, "args")]
        given = fields.text_map(config, "envs")
        _check_text(argv, given)
        envs = self._environment.of_process(user, given, terminal=size is not None)
        if own:  # what the image would have loaded into its programs does not fit ours
            envs = {key: value for key, value in envs.items() if not key.startswith("LD_")}
        cwd = self._environment.directory(user, fields.text(config, "cwd"))
        stdin = fields.flag(message, "stdin", default=True)
        return Command(argv, envs, given, cwd, user, stdin, size)

    def _select(self, message: Message, ended_too: bool = False) -> Process:
        selector = fields.nested(message, "process")
        if selector is None:
            raise InvalidArgument("process is missing")
        pid, tag = fields.number(selector, "pid"), fields.text(selector, "tag")
        if not pid and not tag:
            raise InvalidArgument("process must have a pid or a tag")
        return self._processes.find(pid, tag, ended_too)


async def _write(process: Process, message: Message) -> None:
    given = fields.nested(message, "input") or {}
    for name, terminal in (("stdin", False), ("pty", True)):
        data = fields.data(given, name)
        if data is not None:
            process.check_input(terminal)
            await process.write_input(data)
            return
    raise InvalidArgument("input must have stdin or pty")


def _terminal_size(message: Message) -> tuple[int, int] | None:
    terminal = fields.nested(message, "pty")
    if terminal is None:
        return None
    size = fields.nested(terminal, "size") or {}
    columns, rows = fields.number(size, "cols", 80), fields.number(size, "rows", 24)
    if not (0 < columns <= _MAX_TERMINAL_SIDE and 0 < rows <= _MAX_TERMINAL_SIDE):
        raise InvalidArgument("pty.size must have positive cols and rows")
    return columns, rows


def _shell(name: str) -> str:
    """The program to start: a root without bash has its other shell, where it has one."""
    return _SH if name == _BASH and not os.path.exists(_BASH) else name


def _check_text(argv: list[str], envs: dict[str, str]) -> None:
    if any(not name or "=" in name for name in envs):
        raise InvalidArgument("names of environment variables must not be empty or contain `=`")
    try:
        encoded = [os.fsencode(item) for item in (*argv, *envs, *envs.values())]
    except UnicodeEncodeError as error:
        raise InvalidArgument("command contains text that cannot be encoded") from error
    if any(b"\0" in item for item in encoded):
        raise InvalidArgument("command, arguments and environment must not contain NUL")


def _describe(process: Process) -> Message:
    command = process.command
    config: Message = {
        "cmd": command.argv[0],
        "args": command.argv[1:],
        "envs": command.given_envs,
        "cwd": command.cwd,
    }
    description: Message = {"config": config, "pid": process.pid}
    if process.tag:
        description["tag"] = process.tag
    return description
