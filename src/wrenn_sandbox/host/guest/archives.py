"""Trees of one guest's files as tar archives, through the program that its agent brings."""

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from wrenn_sandbox.aio import first_of
from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    InvalidRequest,
    NoSpace,
    NotInGuest,
    WrennError,
)
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.messages import (
    Channel,
    Command,
    Ended,
    LeftOut,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    Unpacked,
)

from .client import GRACE_SEC
from .connect_rpc import Count, decode, malformed, words
from .processes import INPUT_PIECE, NOT_EXECUTABLE, NOT_FOUND, GuestProcesses

_PROGRAM: Final = "archive"
_WORDS: Final = 16 * 1024
_REPORT: Final = 1024 * 1024
_NAMED: Final = 1000
_KINDS: Final[dict[int, type[WrennError]]] = {
    3: NotInGuest,
    4: InvalidRequest,
    5: NoSpace,
    6: AgentError,
}
"""Exit codes of the program, as in the agent's `archive.py`."""


class _LeftOut(msgspec.Struct):
    path: str
    reason: str


class _Report(msgspec.Struct):
    entries: Count
    size: Count
    into: bool
    left_out: list[_LeftOut]
    left_out_count: Count


class GuestArchives(GuestProcesses):
    """Calls raise what `Guest` says of them."""

    @asynccontextmanager
    async def pack(
        self, path: str, *, recursive: bool, user: str | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        arguments = ("pack", _encoded(path), *(("--recursive",) if recursive else ()))
        async with self._started(arguments, user, stdin=False) as run:
            chunks = run.output()
            first = await anext(chunks, b"")
            yield _after(first, chunks)

    async def unpack(
        self, path: str, chunks: AsyncIterator[bytes], *, needs_directory: bool, user: str | None
    ) -> Unpacked:
        arguments = ("unpack", _encoded(path), *(("--directory",) if needs_directory else ()))
        async with (
            self._started(arguments, user, stdin=True) as run,
            first_of(run.feed(chunks), _all(run.output())) as (feeding, reading),
        ):
            if not reading.done():
                await feeding
            return _report(await reading)

    @asynccontextmanager
    async def _started(
        self, arguments: tuple[str, ...], user: str | None, *, stdin: bool
    ) -> AsyncIterator["_Run"]:
        """The program while the block lasts: one that has not ended by then is ended."""
        command = Command(cmd=_PROGRAM, args=arguments, user=user)
        async with self.start_process(command, stdin=stdin, own=True) as stream:
            run = _Run(self, stream)
            try:
                yield run
            finally:
                if not run.ended:
                    await asyncio.shield(run.end())


class _Run:
    """The program in a guest."""

    def __init__(self, processes: GuestProcesses, stream: ProcessStream) -> None:
        self._processes = processes
        self._stream = stream
        self.ended = stream.pid is None

    async def output(self) -> AsyncIterator[bytes]:
        """What it writes; raises what its exit code stands for."""
        said = bytearray()
        async for event in self._stream.events:
            if isinstance(event, Ended):
                self.ended = True
                if event.exit_code != 0:
                    raise _failure(event.exit_code, bytes(said))
            elif event.channel is Channel.STDOUT:
                yield event.data
            else:
                said += event.data[: max(0, _WORDS - len(said))]

    async def feed(self, chunks: AsyncIterator[bytes]) -> None:
        """Pass its input on, in pieces as large as may be. That it has ended shows elsewhere."""
        pid = self._stream.pid
        if pid is None:
            return
        waiting = bytearray()
        async for chunk in chunks:
            waiting += chunk
            while len(waiting) >= INPUT_PIECE:
                await self._send(pid, bytes(waiting[:INPUT_PIECE]))
                del waiting[:INPUT_PIECE]
        await self._send(pid, bytes(waiting))
        with contextlib.suppress(NotInGuest, Conflict):
            await self._processes.close_input(pid)

    async def _send(self, pid: int, data: bytes) -> None:
        try:
            await self._processes.send_input(pid, data, terminal=False)
        except (NotInGuest, Conflict):
            await asyncio.Event().wait()  # it takes no more: its last words come

    async def end(self) -> None:
        """Let it clean up; it does so by itself when nothing moves any more."""
        with contextlib.suppress(WrennError, TimeoutError):
            async with asyncio.timeout(patience(GRACE_SEC)):
                process = ProcessRef(pid=self._stream.pid)
                await self._processes.signal_process(process, ProcessSignal.TERM)


async def _after(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in chunks:
        yield chunk


async def _all(chunks: AsyncIterator[bytes]) -> bytes:
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > _REPORT:
            raise malformed("too long a report")
    return bytes(data)


def _report(data: bytes) -> Unpacked:
    report = decode(data, _Report)
    return Unpacked(
        entries=report.entries,
        size=report.size,
        into_directory=report.into,
        left_out=tuple(
            LeftOut(path=words(each.path), reason=words(each.reason))
            for each in report.left_out[:_NAMED]
        ),
        left_out_count=report.left_out_count,
    )


def _failure(code: int, said: bytes) -> WrennError:
    if code in (NOT_FOUND, NOT_EXECUTABLE):
        return Conflict(
            "This sandbox was made by an older version, whose agent knows no archives: "
            "run tar in it instead"
        )
    message = words(said.decode("utf-8", "replace").strip())
    kind = _KINDS.get(code)
    if kind is None or not message:  # what it says then is not meant for a caller
        return AgentError("The copy broke off in the sandbox", detail=f"{code}: {message}")
    return kind(message)


def _encoded(path: str) -> str:
    return base64.b64encode(os.fsencode(path)).decode("ascii")
