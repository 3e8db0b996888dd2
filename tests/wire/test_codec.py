"""The seam as bytes: every error class, arguments, streams, and what is not expected."""

import inspect
from collections.abc import AsyncIterator

import pytest

from support.host_double import HostDouble
from support.serializing_host import serializing_host
from wrenn_sandbox import errors
from wrenn_sandbox.errors import (
    AgentError,
    ExecTimeout,
    HostFailure,
    InternalError,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    WrennError,
)
from wrenn_sandbox.host.guest.connect_rpc import RpcError
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire import codec
from wrenn_sandbox.wire.codec import ERRORS, Failure
from wrenn_sandbox.wire.messages import Channel, Command, Ended, Output, Phase

_CLASSES = [
    each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, WrennError)
]
_ID = SandboxId("sb-a")


def _one_of(kind: type[WrennError]) -> WrennError:
    if issubclass(kind, QuotaExceeded):
        return kind("said", limit="sandboxes", retry_after=2.0)
    if issubclass(kind, ExecTimeout):
        return kind("said", stdout="out", stderr="err", encoding="base64")
    return kind("said", detail="for the log", retry_after=1.5)


def _crossed(error: Exception) -> WrennError:
    return codec.error_of(codec.decode(codec.encode(codec.failure_of(error)), Failure))


@pytest.mark.parametrize("kind", _CLASSES)
def test_an_error_of_every_class_crosses_the_seam(kind: type[WrennError]) -> None:
    error = _one_of(kind)
    crossed = _crossed(error)
    assert type(crossed) is kind
    assert vars(crossed) == vars(error)
    assert (str(crossed), crossed.code, crossed.status) == (str(error), error.code, error.status)


def test_text_that_is_no_unicode_is_cleaned_and_the_rest_arrives() -> None:
    output = Output(channel=Channel.STDOUT, data=b"\xff\0")
    failure = Failure(
        name="NotFound", message="no \ud800 there", detail=None, extra={"a": "\udfff"}
    )
    sent = codec.encode((failure, output))
    assert codec.decode(sent, tuple[Failure, Output]) == (
        Failure(name="NotFound", message="no ? there", detail=None, extra={"a": "?"}),
        output,
    )


def test_no_two_error_classes_have_one_name() -> None:
    assert sorted(ERRORS) == sorted(each.__name__ for each in _CLASSES)


def test_an_error_of_the_hosts_own_arrives_as_its_nearest_known_class() -> None:
    crossed = _crossed(RpcError("unknown", "said"))
    assert (type(crossed), crossed.message) == (AgentError, "said")


def test_an_unexpected_error_says_nothing_but_to_the_log() -> None:
    crossed = _crossed(RuntimeError("/secret"))
    assert type(crossed) is InternalError
    assert "/secret" not in str(crossed)
    assert "/secret" in str(crossed.detail)


def test_an_error_of_a_newer_host_is_an_internal_error() -> None:
    failure = Failure(name="NewError", message="said", extra={"limit": "new"})
    assert type(codec.error_of(failure)) is InternalError


def _running() -> HostDouble:
    host = HostDouble()
    host.phases[_ID] = Phase.RUNNING
    return host


async def test_paths_that_are_no_utf_8_arrive_whole() -> None:
    host = _running()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    await serializing_host(host).guest(_ID).write_file("/r\udcff", chunks())
    assert host.files == {"/r\udcff": b"one two"}


async def test_events_of_a_stream_arrive_with_their_types() -> None:
    host = _running()
    host.output = [Output(Channel.STDERR, b"\xff"), Ended(3, 1.5)]
    async with serializing_host(host).guest(_ID).start_process(Command(cmd="x")) as stream:
        assert stream.pid == 1000
        assert [event async for event in stream.events] == host.output


async def test_a_stream_that_breaks_off_raises_the_guests_error() -> None:
    host = _running()
    host.files["/x"], host.breaks_off = b"content", True
    async with serializing_host(host).guest(_ID).read_file("/x") as content:
        with pytest.raises(AgentError):
            _ = [chunk async for chunk in content.chunks]


async def test_what_the_callers_chunks_raise_is_raised_to_the_caller() -> None:
    failure = InvalidRequest("the form broke off")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        raise failure

    host = _running()
    with pytest.raises(InvalidRequest) as caught:
        await serializing_host(host).guest(_ID).write_file("/x", chunks())
    assert caught.value is failure
    assert host.files == {}


async def test_a_call_raises_its_error_and_what_the_block_raises_stays_as_it_is() -> None:
    host = _running()
    host.fail["metrics"] = HostFailure("said", detail="for the log")
    guest = serializing_host(host).guest(_ID)
    with pytest.raises(HostFailure) as caught:
        await guest.metrics()
    assert caught.value is not host.fail["metrics"]
    assert caught.value.detail == "for the log"
    mine = ValueError()
    with pytest.raises(ValueError) as raised:
        async with guest.start_process(Command(cmd="x")):
            raise mine
    assert raised.value is mine


async def test_a_guest_that_does_not_run_is_not_found_by_its_calls() -> None:
    guest = serializing_host(HostDouble()).guest(_ID)
    with pytest.raises(NotFound):
        await guest.health()
