"""QMP, the protocol of QEMU's monitor: JSON messages, one a line, from a peer that may be captured.

Lines and waits are bounded, and messages are taken a few at a time, so that a monitor that floods
slows itself down and nobody else. What nobody waits for is dropped. Protocol: QEMU's
docs/interop/qmp-spec.rst.
"""

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Final, Self, TypeVar, cast

import msgspec

from wrenn_sandbox.patience import patience

Result = TypeVar("Result")

LINE_LIMIT: Final = 256 * 1024
"""Bytes of a message; the longest that is asked for is the console's 64 KiB in base64."""
ANSWER_SEC: Final = 60.0
"""How long an answer may take: none waits for more than the guest's own disk."""
_RATE: Final = 4 * 1024 * 1024
_BURST: Final = 512 * 1024
"""Bytes that are taken in a second, and at once; each message counts for some more."""
_MESSAGE: Final = 256
_BREATH_SEC: Final = 0.005
"""How long a monitor that has said more than that waits at least."""


class QmpError(Exception):
    """The monitor refused a command, lied, did not answer in time or is gone."""


class _Refusal(msgspec.Struct):
    desc: str = ""


class _Message(msgspec.Struct):
    id: int | None = None
    event: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")
    error: _Refusal | None = None
    greeting: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="QMP")
    value: msgspec.Raw = msgspec.field(default=msgspec.Raw(b"null"), name="return")


class Event(msgspec.Struct):
    """Something that the monitor told of itself; `data` is JSON."""

    name: str
    data: bytes


_DECODE: Final = msgspec.json.Decoder(_Message)


class Session(asyncio.Protocol):
    """One connection. After the first failure every call raises what it was."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._failure: QmpError | None = None
        self._greeting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._listeners: dict[asyncio.Future[Event], Collection[str]] = {}
        self._number = 0
        self._breath: asyncio.TimerHandle | None = None
        self._credit = float(_BURST)
        self._counted = asyncio.get_running_loop().time()
        self._ended = asyncio.Event()

    @classmethod
    async def open(cls, path: str, seconds: float) -> Self:
        """Connect and negotiate within so many seconds; raises `QmpError`."""
        try:
            async with asyncio.timeout(patience(seconds)):
                loop = asyncio.get_running_loop()
                _, session = await loop.create_unix_connection(cls, path)
                try:
                    await session._greeting
                    await session.execute("qmp_capabilities")
                except BaseException:
                    await session.close()
                    raise
                return session
        except TimeoutError as error:
            raise QmpError(f"no greeting within {patience(seconds):g} s") from error
        except OSError as error:
            raise QmpError(f"connect: {error}") from error

    @property
    def greeting(self) -> bytes:
        """What the monitor said of itself first, as JSON."""
        return self._greeting.result()

    async def execute(
        self,
        command: str,
        arguments: object = None,
        seconds: float = ANSWER_SEC,
        *,
        patient: bool = False,
    ) -> bytes:
        """The JSON that answers a command; raises `QmpError`, also after so many seconds.

        The session has failed then, unless it is `patient` and the monitor still reads.
        """
        if self._failure is not None or self._transport is None:
            raise self._failure or QmpError("not connected")
        self._number += 1
        number = self._number
        message: dict[str, object] = {"execute": command, "id": number}
        if arguments is not None:
            message["arguments"] = arguments
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            async with asyncio.timeout(patience(seconds)):
                self._transport.write(msgspec.json.encode(message) + b"\n")
                return await answer
        except TimeoutError as error:
            silence = f"no answer to {command} within {patience(seconds):g} s"
            if not patient or self._transport.get_write_buffer_size():
                self._fail(silence)
            raise QmpError(silence) from error
        finally:
            self._answers.pop(number, None)

    @contextlib.contextmanager
    def listening(self, *names: str) -> Iterator["asyncio.Future[Event]"]:
        """The next event of one of these names from now on."""
        heard: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            heard.set_exception(self._failure)
        self._listeners[heard] = names
        try:
            yield heard
        finally:
            del self._listeners[heard]
            if heard.done() and not heard.cancelled():
                heard.exception()

    async def close(self) -> None:
        """End the session; safe to repeat."""
        self._fail("closed here")
        if self._transport is not None:
            await self._ended.wait()

    def _fail(self, reason: str) -> None:
        if self._failure is not None:
            return
        self._failure = QmpError(reason)
        self._buffer.clear()
        if self._breath is not None:
            self._breath.cancel()
        if self._transport is not None:
            self._transport.abort()
        _refuse((self._greeting,), self._failure)
        _refuse(self._answers.values(), self._failure)
        _refuse(self._listeners, self._failure)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._failure is None:
            self._buffer += data
            if self._breath is None:
                self._take()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()
        self._fail(f"connection lost: {exc}")

    def _take(self) -> None:
        """Take messages off the buffer as long as there is credit, the next ones later."""
        loop = asyncio.get_running_loop()
        self._breath = None
        self._credit = min(_BURST, self._credit + _RATE * (loop.time() - self._counted))
        self._counted = loop.time()
        start = end = 0
        while self._credit > 0 and self._failure is None:
            end = self._buffer.find(b"\n", start, start + LINE_LIMIT)
            if end < 0:
                break
            self._read(bytes(self._buffer[start:end]))
            self._credit -= end - start + _MESSAGE
            start = end + 1
        if self._failure is not None or self._transport is None:
            return
        del self._buffer[:start]
        if end >= 0:
            self._transport.pause_reading()
            self._breath = loop.call_later(_BREATH_SEC, self._take)
        elif len(self._buffer) >= LINE_LIMIT:
            self._fail("endless message")
        else:
            self._transport.resume_reading()

    def _read(self, line: bytes) -> None:
        try:
            message = _DECODE.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._fail(f"not QMP: {str(error)[:200]}")
            return
        if message.event is not None:
            event = Event(message.event, bytes(message.data))
            for heard, names in self._listeners.items():
                if event.name in names and not heard.done():
                    heard.set_result(event)
        elif bytes(message.greeting):
            if not self._greeting.done():
                self._greeting.set_result(bytes(message.greeting))
        elif message.id in self._answers and not self._answers[message.id].done():
            answer = self._answers[message.id]
            if message.error is None:
                answer.set_result(bytes(message.value))
            else:
                answer.set_exception(QmpError(message.error.desc[:500]))


def _refuse(futures: "Iterable[asyncio.Future[Result]]", failure: QmpError) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(failure)
            future.exception()
