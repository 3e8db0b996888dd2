"""A host of the same process behind an encoder: only bytes cross between its caller and it."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from typing import Protocol, cast

from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire import codec
from wrenn_sandbox.wire.codec import Call, Failure
from wrenn_sandbox.wire.guest import Guest
from wrenn_sandbox.wire.host import Host
from wrenn_sandbox.wire.messages import ProcessEvent

Opened = tuple[int | None, AsyncIterator[bytes]]
"""The head of a stream and its pieces, each encoded."""


class Channel(Protocol):
    """What carries calls to a host, or to the guest of a sandbox; raises the errors of either."""

    async def ask(
        self,
        sandbox_id: SandboxId | None,
        name: str,
        arguments: bytes,
        chunks: AsyncIterator[bytes] | None,
    ) -> bytes: ...

    def open(
        self,
        sandbox_id: SandboxId | None,
        name: str,
        arguments: bytes,
        chunks: AsyncIterator[bytes] | None,
    ) -> AbstractAsyncContextManager[Opened]: ...


def host_behind(channel: Channel) -> Host:
    """The caller's end: calls and their answers as bytes."""
    return cast(Host, _HostStub(channel))


def serializing_host(host: Host) -> Host:
    """`host` with each argument, answer, piece of a stream, event and error encoded and decoded.

    As over a network, calls into a guest that does not run fail when they are made.
    """
    return host_behind(Loopback(host))


class _HostStub:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def guest(self, sandbox_id: SandboxId) -> Guest:
        return cast(Guest, _GuestStub(self._channel, sandbox_id))

    def __getattr__(self, name: str) -> Callable[..., object]:
        return _function(self._channel, None, codec.HOST_CALLS[name])


class _GuestStub:
    def __init__(self, channel: Channel, sandbox_id: SandboxId) -> None:
        self._channel = channel
        self._id = sandbox_id

    def __getattr__(self, name: str) -> Callable[..., object]:
        return _function(self._channel, self._id, codec.GUEST_CALLS[name])


def _function(channel: Channel, sandbox_id: SandboxId | None, call: Call) -> Callable[..., object]:
    async def ask(*args: object, **kwargs: object) -> object:
        arguments = call.encode_arguments(*args, **kwargs)
        chunks = call.stream_among(*args, **kwargs)
        return call.decode_answer(await channel.ask(sandbox_id, call.name, arguments, chunks))

    @asynccontextmanager
    async def opened(*args: object, **kwargs: object) -> AsyncIterator[object]:
        arguments = call.encode_arguments(*args, **kwargs)
        chunks = call.stream_among(*args, **kwargs)
        async with channel.open(sandbox_id, call.name, arguments, chunks) as (head, pieces):
            yield call.put_together(head, pieces)

    return ask if call.opens is None else opened


class Loopback:
    """The host's end, and the channel to it within one process."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def _target(self, sandbox_id: SandboxId | None) -> tuple[Mapping[str, Call], Host | Guest]:
        if sandbox_id is None:
            return codec.HOST_CALLS, self._host
        return codec.GUEST_CALLS, self._host.guest(sandbox_id)

    async def ask(
        self,
        sandbox_id: SandboxId | None,
        name: str,
        arguments: bytes,
        chunks: AsyncIterator[bytes] | None,
    ) -> bytes:
        failures: list[Exception] = []
        try:
            with _crossing():
                calls, target = self._target(sandbox_id)
                values = calls[name].decode_arguments(arguments)
                if chunks is not None:
                    values[calls[name].takes or ""] = _sent(chunks, failures)
                return codec.encode(await getattr(target, name)(**values))
        except Exception:
            if failures:  # the caller's own, which never left its side
                raise failures[0] from None
            raise

    @asynccontextmanager
    async def open(
        self,
        sandbox_id: SandboxId | None,
        name: str,
        arguments: bytes,
        chunks: AsyncIterator[bytes] | None,
    ) -> AsyncIterator[Opened]:
        async with AsyncExitStack() as stack:
            with _crossing():
                calls, target = self._target(sandbox_id)
                values = calls[name].decode_arguments(arguments)
                if chunks is not None:
                    values[calls[name].takes or ""] = _sent(chunks, [])
                stream = await stack.enter_async_context(getattr(target, name)(**values))
            head, pieces = codec.taken_apart(stream)
            yield head, _encoded(pieces)


@contextmanager
def _crossing() -> Iterator[None]:
    """What is raised inside as the other side gets it."""
    try:
        yield
    except Exception as error:
        data = codec.encode(codec.failure_of(error))
        raise codec.error_of(codec.decode(data, Failure)) from error


async def _encoded(pieces: AsyncIterator[bytes | ProcessEvent]) -> AsyncIterator[bytes]:
    with _crossing():
        async for piece in pieces:
            yield codec.encode(piece)


async def _sent(chunks: AsyncIterator[bytes], failures: list[Exception]) -> AsyncIterator[bytes]:
    """The caller's chunks as the host gets them; what they raise is kept for the caller."""
    try:
        async for chunk in chunks:
            yield codec.decode(codec.encode(chunk), bytes)
    except Exception as error:
        failures.append(error)
        raise codec.error_of(codec.failure_of(error)) from error
