"""A client and a command: output one way, input and signals the other."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

from pydantic import BaseModel

from wrenn_sandbox.errors import Unauthorized, WrennError
from wrenn_sandbox.wire.guest import Guest
from wrenn_sandbox.wire.messages import (
    Channel,
    Ended,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
)

from .frames import PING, Exit, Frame, Started
from .messages import (
    KillMessage,
    PtyInputMessage,
    ResizeMessage,
    StdinCloseMessage,
    StdinMessage,
    StopMessage,
)
from .websocket import NO_LONGER, Lost, Malformed, Socket

TERM_SECONDS: Final = 5.0
"""How long a process group has to end after SIGTERM."""

DETACH_SECONDS: Final = 5.0
"""How long a command has to take what a client sent before it went."""

FAREWELL_SECONDS: Final = 5.0
"""How long a client that is turned out has to read why."""

PING_SECONDS: Final = 20.0
_INPUT_LIMIT: Final = 1024 * 1024
"""Bytes of input that wait for the command; more is not read from the client."""
_INPUT_PIECE: Final = 256 * 1024
_END_OF_INPUT: Final = b"\x04"


class Frames(Protocol):
    """Turns output into frames."""

    def of(self, channel: Channel, data: bytes) -> Sequence[Frame | bytes]: ...

    def rest(self) -> Sequence[Frame | bytes]:
        """What is left when the output has ended."""
        ...


class Session:
    """Runs until the command has ended, or until the client has gone.

    `read` gives the message in a frame, where bytes are input as it is, and raises `Malformed`.
    With `ends_with_client` the session says that the command has started, and a client that goes
    takes the process group with it, also one that does not stay for that; without, the command
    runs on. `pings` sends a frame now and then, for clients that see no protocol pings.
    """

    def __init__(
        self,
        socket: Socket,
        guest: Guest,
        stream: ProcessStream,
        frames: Frames,
        read: Callable[[str | bytes], BaseModel | bytes],
        *,
        terminal: bool,
        ends_with_client: bool = False,
        pings: bool = False,
    ) -> None:
        self._socket = socket
        self._guest = guest
        self._stream = stream
        self._frames = frames
        self._read = read
        self._terminal = terminal
        self._ends_with_client = ends_with_client
        self._pings = pings
        self._input = _InputBuffer()
        self._failure: WrennError | None = None
        self._gone = False
        self._ending: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Raises what the guest's failures raise; closes the socket after the last frame."""
        async with asyncio.TaskGroup() as tasks:
            self._following = tasks.create_task(self._follow())
            self._listening = tasks.create_task(self._listen())
            helpers = [
                self._listening,
                tasks.create_task(self._watch()),
                tasks.create_task(self._turn_out()),
            ]
            if self._stream.pid is not None:
                helpers.append(tasks.create_task(self._feed(self._stream.pid)))
            if self._pings:
                helpers.append(tasks.create_task(self._ping()))
            await asyncio.wait([self._following])
            if self._ending is not None:
                helpers.append(self._ending)
            for task in helpers:
                task.cancel()
            await asyncio.wait(helpers)
        if self._failure is not None:
            raise self._failure

    async def _follow(self) -> None:
        try:
            if self._ends_with_client and self._stream.pid is not None:
                await self._say([Started(self._stream.pid)])
            async for event in self._stream.events:
                if isinstance(event, Ended):
                    await self._say([*self._frames.rest(), Exit(event.exit_code)])
                    break
                if event.channel is Channel.TERMINAL:
                    self._terminal = True
                await self._say(self._frames.of(event.channel, event.data))
            if not self._gone:
                await self._socket.close()
        except Lost:
            return
        except WrennError as error:
            self._failure = error

    async def _say(self, frames: Sequence[Frame | bytes]) -> None:
        try:
            for frame in frames:
                if not self._gone:
                    await self._socket.send(frame)
        except Lost:
            self._client_gone()

    async def _listen(self) -> None:
        try:
            while True:
                await self._do(self._read(await self._socket.content()))
        except Lost:
            self._client_gone()
        except Malformed as error:
            await self._socket.fail(error)
            self._client_gone()

    async def _do(self, message: BaseModel | bytes) -> None:
        match message:
            case bytes(data) | PtyInputMessage(data=data):
                await self._input.put(data)
            case StdinMessage():
                await self._input.put(message.content)
            case StdinCloseMessage():
                self._input.close()
            case ResizeMessage(cols=cols, rows=rows) if self._stream.pid is not None:
                with suppress(WrennError):
                    size = TerminalSize(cols=cols, rows=rows)
                    await self._guest.resize_terminal(self._stream.pid, size)
            case StopMessage() | KillMessage():
                self._end(grace=isinstance(message, StopMessage))

    async def _watch(self) -> None:
        """A client that goes while it is not read shows here only."""
        await self._socket.lost.wait()
        self._client_gone()

    async def _turn_out(self) -> None:
        """A client whose credential does not count any more goes, whether it reads or not."""
        await self._socket.revoked.wait()
        self._listening.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._socket.fail(Unauthorized(NO_LONGER))
        self._client_gone()
        if self._ending is not None:
            await asyncio.wait([self._ending])
        self._following.cancel()

    async def _ping(self) -> None:
        with suppress(Lost):
            while True:
                await asyncio.sleep(PING_SECONDS)
                await self._socket.send(PING)

    async def _feed(self, pid: int) -> None:
        """Pass input on. A command that takes none any more loses it, as behind a broken pipe."""
        try:
            while (data := await self._input.take(_INPUT_PIECE)) is not None:
                await self._guest.send_input(pid, data, terminal=self._terminal)
            if self._terminal:
                await self._guest.send_input(pid, _END_OF_INPUT, terminal=True)
            else:
                await self._guest.close_input(pid)
        except WrennError:
            self._input.give_up()

    def _client_gone(self) -> None:
        if self._gone:
            return
        self._gone = True
        if self._ends_with_client:
            self._end(grace=True)
        elif self._ending is None:
            self._ending = asyncio.create_task(self._detach())

    async def _detach(self) -> None:
        """Leave the command alone, once it has what its client sent before going."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DETACH_SECONDS):
                await self._input.taken.wait()
        self._following.cancel()

    def _end(self, grace: bool) -> None:
        if self._stream.pid is None or (self._ending is not None and grace):
            return
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.create_task(self._kill(self._stream.pid, grace))

    async def _kill(self, pid: int, grace: bool) -> None:
        process = ProcessRef(pid=pid)
        if grace:
            with suppress(WrennError):
                await self._guest.signal_process(process, ProcessSignal.TERM)
            await asyncio.sleep(TERM_SECONDS)
        with suppress(WrennError):
            await self._guest.signal_process(process, ProcessSignal.KILL)


class _InputBuffer:
    """Input on its way: `put` waits while too much of it waits already."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._closed = False
        self._useless = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self.taken = asyncio.Event()
        """Nothing waits, and what was taken has arrived."""
        self.taken.set()

    async def put(self, data: bytes) -> None:
        while len(self._data) >= _INPUT_LIMIT and not self._useless:
            self._room.clear()
            await self._room.wait()
        if not (self._closed or self._useless):
            self._data += data
            self.taken.clear()
            self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    def give_up(self) -> None:
        """Drop what waits and all that comes."""
        self._useless = True
        self._data.clear()
        self._room.set()
        self.taken.set()

    async def take(self, limit: int) -> bytes | None:
        """The next bytes; None at the end of the input."""
        while not self._data:
            self.taken.set()
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()
        data = bytes(self._data[:limit])
        del self._data[:limit]
        self._room.set()
        return data
