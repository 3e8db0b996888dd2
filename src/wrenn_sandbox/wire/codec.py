"""The seam as bytes, for a host in another process: its calls, answers, streams and errors.

Everything is MessagePack. What a call takes and gives follows from the signatures of `Host` and
`Guest`. A stream is a head, an integer or nil, followed by its pieces one by one.
"""

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from wrenn_sandbox import errors
from wrenn_sandbox.errors import InternalError, WrennError

from .guest import Guest
from .host import Host
from .messages import FileContent, GuestPath, ProcessEvent, ProcessStream

T = TypeVar("T")
Stream = FileContent | ProcessStream | AsyncIterator[bytes]

_UNEXPECTED: Final = "The host failed unexpectedly"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error on the wire. `name` is that of its class in `errors`, not the public code."""

    name: str
    message: str
    detail: str | None = None
    retry_after: float | None = None
    extra: dict[str, str] = {}


def _classes(base: type[WrennError]) -> list[type[WrennError]]:
    return [base, *(each for sub in base.__subclasses__() for each in _classes(sub))]


ERRORS: Final[Mapping[str, type[WrennError]]] = {
    each.__name__: each for each in _classes(WrennError) if each.__module__ == errors.__name__
}


def failure_of(error: Exception) -> Failure:
    """What the other side is told of an error: of a host's own class, the nearest of `errors`."""
    if not isinstance(error, WrennError):
        error = InternalError(_UNEXPECTED, detail=repr(error))
    return Failure(
        name=next(each.__name__ for each in type(error).__mro__ if each.__name__ in ERRORS),
        message=error.message,
        detail=error.detail,
        retry_after=error.retry_after,
        extra=dict(error.extra()),
    )


def error_of(failure: Failure) -> WrennError:
    """The error again; one of a class that is not known here is an `InternalError`."""
    kind = cast(Callable[..., WrennError], ERRORS.get(failure.name, InternalError))
    error = kind(failure.message, **(failure.extra if failure.name in ERRORS else {}))
    error.detail, error.retry_after = failure.detail, failure.retry_after
    return error


def encode(value: object) -> bytes:
    """Text that is not valid Unicode loses what is not: a guest may have written it."""
    try:
        return msgspec.msgpack.encode(value)
    except UnicodeEncodeError:
        return msgspec.msgpack.encode(_valid(msgspec.to_builtins(value, builtin_types=(bytes,))))


def _valid(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_valid(key): _valid(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(each) for each in value]
    return value


def decode(data: bytes, form: type[T]) -> T:
    """Raises `msgspec.MsgspecError`."""
    return msgspec.msgpack.decode(data, type=form)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `Host` or `Guest`.

    `answer` is the type of its answer; `opens` that of the stream which a block holds open instead.
    `takes` names the argument that is a stream of bytes.
    """

    name: str
    answer: object
    opens: object
    takes: str | None
    _signature: inspect.Signature
    _form: type[msgspec.Struct]
    _paths: frozenset[str]

    def encode_arguments(self, *args: object, **kwargs: object) -> bytes:
        """All arguments but the one that is a stream."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = {key: value for key, value in bound.arguments.items() if key != self.takes}
        for each in self._paths:
            values[each] = values[each].encode("utf-8", "surrogateescape")
        return encode(self._form(**values))

    def decode_arguments(self, data: bytes) -> dict[str, object]:
        """The same by their names."""
        values = msgspec.structs.asdict(decode(data, self._form))
        for each in self._paths:
            values[each] = values[each].decode("utf-8", "surrogateescape")
        return values

    def stream_among(self, *args: object, **kwargs: object) -> AsyncIterator[bytes] | None:
        """The argument that is a stream of bytes."""
        if self.takes is None:
            return None
        found: AsyncIterator[bytes] = self._signature.bind(*args, **kwargs).arguments[self.takes]
        return found

    def decode_answer(self, data: bytes) -> object:
        return msgspec.msgpack.decode(data, type=self.answer)

    def put_together(self, head: int | None, pieces: AsyncIterator[bytes]) -> Stream:
        """An open stream of its head and its encoded pieces."""
        if self.opens is FileContent:
            return FileContent(head, _decoded(pieces, _CHUNK))
        if self.opens is ProcessStream:
            return ProcessStream(head, _decoded(pieces, _EVENT))
        return _decoded(pieces, _CHUNK)


_CHUNK: Final = msgspec.msgpack.Decoder(bytes)
_EVENT: Final[msgspec.msgpack.Decoder[ProcessEvent]] = msgspec.msgpack.Decoder(ProcessEvent)


async def _decoded(
    pieces: AsyncIterator[bytes], decoder: msgspec.msgpack.Decoder[T]
) -> AsyncIterator[T]:
    async for piece in pieces:
        yield decoder.decode(piece)


def taken_apart(stream: Stream) -> tuple[int | None, AsyncIterator[bytes | ProcessEvent]]:
    """The head of an open stream, and its pieces."""
    match stream:
        case FileContent(size=size, chunks=chunks):
            return size, chunks
        case ProcessStream(pid=pid, events=events):
            return pid, events
        case _:
            return None, stream


def _call(name: str, function: object) -> Call:
    assert inspect.isfunction(function)
    hints = get_type_hints(function, include_extras=True)
    answer = hints.pop("return")
    opens = get_args(answer)[0] if get_origin(answer) is AbstractAsyncContextManager else None
    takes = next((key for key in hints if get_origin(hints[key]) is AsyncIterator), None)
    paths = frozenset(key for key in hints if hints[key] == GuestPath)
    fields = [(key, bytes if key in paths else hints[key]) for key in hints if key != takes]
    signature = inspect.signature(function)
    own = [each for key, each in signature.parameters.items() if key != "self"]
    return Call(
        name,
        None if opens is not None else answer,
        opens,
        takes,
        signature.replace(parameters=own),
        msgspec.defstruct(name, fields, kw_only=True),
        paths,
    )


def _calls(interface: type) -> dict[str, Call]:
    found = {name: each for name, each in vars(interface).items() if not name.startswith("_")}
    return {name: _call(name, each) for name, each in found.items() if name != "guest"}


HOST_CALLS: Final[Mapping[str, Call]] = _calls(Host)
"""All calls of `Host` but `guest`, which is local: its calls name the sandbox besides."""
GUEST_CALLS: Final[Mapping[str, Call]] = _calls(Guest)
