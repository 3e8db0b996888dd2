"""A hostile guest behind the real calls of a real host, and through the public API.

Whatever it says, each call ends in time with a result within bounds or with an error that tells
nothing of the host; nothing is leaked, and nobody else waits for it.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from support.hostile_guest import (
    CHUNKED,
    END,
    HostileGuest,
    Liar,
    Script,
    answer,
    chunk,
    diverted,
    event,
    frame,
    says,
)
from support.lag import Lag
from wrenn_sandbox.errors import AgentError, WrennError
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.ids import SandboxId, new_operation_id, new_sandbox_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import (
    Command,
    CreateSandbox,
    Ended,
    Output,
    ProcessRef,
    ProcessSignal,
    ProcessStream,
    TerminalSize,
)

pytestmark = pytest.mark.usefixtures("short_waits", "logs", "no_old_garbage")

_MB: Final = 1 << 20
_OUTPUT: Final = _MB
_EXEC_SEC: Final = 0.3
_FOLLOW_SEC: Final = 0.5
_LAG_SEC: Final = 0.1
_COMMAND: Final = Command(cmd="true")
_FUZZ_SEC: Final = 8.0


class Stand:
    """A host with a sandbox whose guest is hostile and one whose guest is not."""

    def __init__(
        self, host: HostAgent, guest: HostileGuest, data_dir: Path, hostile_ports: set[int]
    ) -> None:
        self.host = host
        self.guest = guest
        self.data_dir = data_dir
        self.hostile_ports = hostile_ports
        self.bad: SandboxId = new_sandbox_id()
        self.good: SandboxId = new_sandbox_id()

    async def create(self, sandbox_id: SandboxId) -> None:
        [template] = await self.host.templates()
        await self.host.create(
            CreateSandbox(
                sandbox_id=sandbox_id,
                operation_id=new_operation_id(),
                image_id=template.image_id,
                vcpus=1,
                memory_mb=256,
            )
        )

    def turn(self) -> None:
        """The guest has turned hostile."""
        slot = self.host._sandboxes[self.bad].machine.spec.slot
        assert slot.host_port is not None
        self.hostile_ports.add(slot.host_port)
        self.host._sandboxes[self.bad].machine.client.close()
        machine = self.host._sandboxes[self.bad].machine
        machine._client = machine._new_client(machine.record.token)


@asynccontextmanager
async def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    """A host on which both sandboxes run and one has turned."""
    values = {"data_dir": tmp_path / "data", "driver": "fake", "boot_timeout_sec": 3.0}
    settings = Settings.model_validate({**values, "hot_pool_size": 0})
    with HostileGuest() as guest:
        ports = diverted(monkeypatch, guest)
        host = await HostAgent.start(settings)
        stand = Stand(host, guest, settings.data_dir, ports)
        try:
            await stand.create(stand.bad)
            await stand.create(stand.good)
            await stand.host.guest(stand.good).exec(_COMMAND, timeout=20, output_limit=100)
            stand.turn()
            yield stand
        finally:
            for report in await host.sandboxes():
                await host.destroy(report.sandbox_id, new_operation_id())
            await host.close()


@pytest.fixture
async def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    async with standing(tmp_path, monkeypatch) as stand:
        yield stand


async def _exec(stand: Stand) -> None:
    result = await stand.host.guest(stand.bad).exec(
        _COMMAND, timeout=_EXEC_SEC, output_limit=_OUTPUT
    )
    assert 0 <= result.exit_code <= 255
    assert len(result.stdout) <= _OUTPUT
    assert len(result.stderr) <= _OUTPUT
    assert 0 <= result.duration_ms <= 30_000


async def _metrics(stand: Stand) -> None:
    found = await stand.host.guest(stand.bad).metrics()
    assert 0 <= found.mem_total < 2**63
    assert found.cpu_used_pct >= 0


async def _processes(stand: Stand) -> None:
    found = await stand.host.guest(stand.bad).processes()
    assert all(0 < each.pid < 2**31 for each in found)


async def _list(stand: Stand) -> None:
    for each in await stand.host.guest(stand.bad).list_directory("/root", 1):
        assert each.name not in ("", ".", "..")
        assert "/" not in each.name
        assert "\0" not in each.name
        assert each.path.startswith("/")
        assert each.path.endswith("/" + each.name)
        assert "/../" not in each.path
        assert each.size >= 0
        assert each.modified_at.tzinfo is not None


async def _make_directory(stand: Stand) -> None:
    await stand.host.guest(stand.bad).make_directory("/root/x")


async def _remove(stand: Stand) -> None:
    await stand.host.guest(stand.bad).remove_path("/root/x")


async def _read(stand: Stand) -> None:
    async with stand.host.guest(stand.bad).read_file("/root/x") as content:
        count = 0
        async for piece in content.chunks:
            count += len(piece)
            if count > 2 * _MB:
                return
        assert content.size is None or content.size == count


async def _write(stand: Stand) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield bytes(300_000)

    await stand.host.guest(stand.bad).write_file("/root/x", chunks())


async def _pack(stand: Stand) -> None:
    count = 0
    async with stand.host.guest(stand.bad).pack("/root", recursive=True, user=None) as chunks:
        async for piece in chunks:
            count += len(piece)
            if count > 2 * _MB:
                return


async def _unpack(stand: Stand) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield bytes(300_000)

    found = await stand.host.guest(stand.bad).unpack(
        "/root", chunks(), needs_directory=False, user=None
    )
    assert len(found.left_out) <= 1000
    assert all(len(each.reason) <= 2000 for each in found.left_out)


async def _follow(stream: ProcessStream) -> None:
    assert stream.pid is None or 0 < stream.pid < 2**31
    count = 0
    ended = False
    async for each in stream.events:
        assert not ended
        if isinstance(each, Output):
            count += len(each.data)
            if count > 2 * _MB:
                return
        elif isinstance(each, Ended):
            assert 0 <= each.exit_code <= 255
            ended = True
    assert ended


async def _start(stand: Stand) -> None:
    async with (
        asyncio.timeout(_FOLLOW_SEC),
        stand.host.guest(stand.bad).start_process(
            _COMMAND, tag="t", stdin=True, terminal=TerminalSize(cols=80, rows=24)
        ) as stream,
    ):
        await _follow(stream)


async def _attach(stand: Stand) -> None:
    async with (
        asyncio.timeout(_FOLLOW_SEC),
        stand.host.guest(stand.bad).attach_process(ProcessRef(tag="t"), replay=True) as stream,
    ):
        await _follow(stream)


async def _detached(stand: Stand) -> None:
    assert 0 < await stand.host.guest(stand.bad).start_detached(_COMMAND, tag="t") < 2**31


async def _input(stand: Stand) -> None:
    await stand.host.guest(stand.bad).send_input(7, b"x" * 300_000, terminal=False)


async def _close_input(stand: Stand) -> None:
    await stand.host.guest(stand.bad).close_input(7)


async def _resize(stand: Stand) -> None:
    await stand.host.guest(stand.bad).resize_terminal(7, TerminalSize(cols=1, rows=1))


async def _signal(stand: Stand) -> None:
    await stand.host.guest(stand.bad).signal_process(ProcessRef(pid=7), ProcessSignal.KILL)


Call = Callable[[Stand], Awaitable[None]]
_STREAMS: Final[tuple[Call, ...]] = (_exec, _start, _attach, _detached)
_CALLS: Final[tuple[Call, ...]] = (
    *_STREAMS,
    _metrics,
    _processes,
    _list,
    _make_directory,
    _remove,
    _read,
    _write,
    _pack,
    _unpack,
    _input,
    _close_input,
    _resize,
    _signal,
)


async def _attempt(stand: Stand, call: Call) -> None:
    """Do a call; it ends, and an error of it tells nothing of the host."""
    try:
        async with asyncio.timeout(20) as limit:
            await call(stand)
    except TimeoutError:
        assert not limit.expired(), call
    except WrennError as error:
        _require_discreet(error, stand)


def _require_discreet(error: WrennError, stand: Stand) -> None:
    text = str(error)
    assert len(text) <= 2000
    assert "\x1b" not in text
    assert "\n" not in text
    assert "127.0.0.1" not in text
    assert str(stand.data_dir) not in text
    assert len(error.detail or "") < 2000


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Memory:
    """How much more memory this process had at any time than in the beginning."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._most()

    def _most(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    @property
    def taken(self) -> int:
        """In bytes."""
        return self._most() - self._before


async def _at_rest(stand: Stand) -> tuple[int, int]:
    """Tasks and descriptors when nothing is under way and no connection is kept."""
    client = stand.host._sandboxes[stand.bad].machine.client
    await asyncio.to_thread(stand.guest.hang_up)
    for _ in range(200):
        await asyncio.sleep(0.005)
        if not client._busy and all(not each.reusable for each in client._idle):
            break
    assert not client._busy
    for idle in (client._idle, stand.host._sandboxes[stand.good].machine.client._idle):
        for each in idle:
            each.close()
        idle.clear()
    await asyncio.sleep(0.01)
    return len(asyncio.all_tasks()), _files()


async def _nothing_left(stand: Stand, before: tuple[int, int]) -> None:
    for _ in range(40):
        tasks, files = await _at_rest(stand)
        if tasks <= before[0] and files <= before[1] + 2:
            break
        await asyncio.sleep(0.05)  # the host measures its guests every few seconds
    assert tasks <= before[0]
    assert files <= before[1] + 2


_FILLER: Final = b"x" * 65536
_ENTRY: Final = (
    b'{"name":"a","path":"/a","type":"","size":"1","mode":1,"permissions":"","owner":"",'
    b'"group":"","modifiedTime":"2026-01-01T00:00:00Z"}'
)
_PROCESS: Final = b'{"config":{"cmd":""},"pid":1}'


def _flood(first: bytes, endless: bytes) -> Script:
    return says(first, endless, ending="flood")


_FLOODS: Final[dict[str, tuple[Script, tuple[Call, ...]]]] = {
    "header lines": (_flood(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 20_000), _CALLS),
    "one header": (_flood(b"HTTP/1.1 200 OK\r\nA: ", _FILLER), _CALLS),
    "status line": (_flood(b"HTTP/1.1 200 ", _FILLER), _CALLS),
    "interim answers": (_flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), _CALLS),
    "empty lines": (_flood(b"", b"\r\n" * 30_000), _CALLS),
    "body": (_flood(CHUNKED, chunk(_FILLER)), _CALLS),
    "body of one byte pieces": (_flood(CHUNKED, b"1\r\nx\r\n" * 10_000), _CALLS),
    "body without framing": (_flood(b"HTTP/1.1 200 OK\r\n\r\n", _FILLER), _CALLS),
    "huge length": (
        _flood(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n", _FILLER),
        _CALLS,
    ),
    "chunk extension": (_flood(CHUNKED + b"5;", _FILLER), _CALLS),
    "trailers": (_flood(CHUNKED + END[:-2], b"A: b\r\n" * 20_000), _CALLS),
    "starts": (_flood(CHUNKED, event(start={"pid": 7}) * 2000), _STREAMS),
    "keepalives": (
        _flood(CHUNKED + event(start={"pid": 7}), event(keepalive={}) * 2000),
        _STREAMS,
    ),
    "keepalives in one": (
        _flood(CHUNKED + event(start={"pid": 7}), chunk(frame({}) * 9000)),
        _STREAMS,
    ),
    "output": (
        _flood(CHUNKED + event(start={"pid": 7}), event(data={"stdout": "QUJD" * 20_000})),
        _STREAMS,
    ),
    "output in small pieces": (
        _flood(CHUNKED + event(start={"pid": 7}), event(data={"stdout": "QUJD"}) * 2000),
        _STREAMS,
    ),
    "one message": (
        _flood(CHUNKED + chunk(b"\0\x00\x0f\xff\xff"), chunk(b'{"x":"' + _FILLER)),
        _STREAMS,
    ),
    "a message of gigabytes": (
        _flood(CHUNKED + chunk(b"\0\xff\xff\xff\xff"), chunk(_FILLER)),
        _STREAMS,
    ),
    "ends": (_flood(CHUNKED, event(end={"exitCode": 0}) * 2000), _STREAMS),
}


async def test_floods_of_a_guest_are_bounded(
    stand: Stand, logs: list[MutableMapping[str, object]]
) -> None:
    """Others are served meanwhile, and memory is what a few pieces take."""
    for name, (script, calls) in _FLOODS.items():
        before = await _at_rest(stand)
        memory = Memory()
        stand.guest.script = script
        lag = Lag()
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(_attempt(stand, call))
                tasks.create_task(_served(stand))
        assert await lag.end() < _LAG_SEC, name
        assert memory.taken < 4 * _MB * len(calls), name
        await _nothing_left(stand, before)
    assert sum(len(str(each)) for each in logs) < 20_000


async def _served(stand: Stand) -> None:
    """Another sandbox answers."""
    async with asyncio.timeout(10):
        await stand.host.guest(stand.good).metrics()


def _list_of(name: bytes, each: bytes, count: int) -> bytes:
    return b'{"%b":[' % name + b",".join([each] * count) + b"]}"


_HUGE: Final[dict[str, tuple[Callable[[], bytes], Call]]] = {
    "millions of entries": (lambda: _list_of(b"entries", b"{}", 2_500_000), _list),
    "too many entries": (lambda: _list_of(b"entries", _ENTRY, 50_000), _list),
    "as many entries as may be": (lambda: _list_of(b"entries", _ENTRY, 20_000), _list),
    "too many processes": (lambda: _list_of(b"processes", _PROCESS, 130_000), _processes),
    "too many arguments": (
        lambda: (
            b'{"processes":[{"config":{"cmd":"","args":['
            + b",".join([b'""'] * 1_300_000)
            + b']},"pid":1}]}'
        ),
        _processes,
    ),
    "deep": (lambda: b'{"entries":' + b"[" * 4_000_000, _list),
    "a long error": (lambda: b'{"code":"internal","message":"' + b"x" * 200_000 + b'"}', _metrics),
    "many keys": (lambda: b"{" + b",".join(b'"%d":1' % n for n in range(20_000)) + b"}", _metrics),
}


async def test_huge_answers_of_a_guest_are_bounded(stand: Stand) -> None:
    for name, (body, call) in _HUGE.items():
        stand.guest.script = says(answer(body()), ending="wait")
        before = await _at_rest(stand)
        memory = Memory()
        lag = Lag()
        await _attempt(stand, call)
        assert await lag.end() < _LAG_SEC, name
        assert memory.taken < 64 * _MB, name
        await _nothing_left(stand, before)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED, CHUNKED + b"5\r\n"])
async def test_silence_has_an_end(said: bytes, stand: Stand) -> None:
    """Whatever was said before it, and whoever waits."""
    await _all_end(stand, says(said, ending="wait"))


async def test_one_byte_after_the_other_has_an_end(stand: Stand) -> None:
    pieces = [(0.05, bytes([each])) for each in b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20]
    await _all_end(stand, Script(pieces, "wait"), but=(_read, _write))


async def _all_end(stand: Stand, script: Script, but: tuple[Call, ...] = ()) -> None:
    before = await _at_rest(stand)
    stand.guest.script = script
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for call in _CALLS:
            if call not in but:
                tasks.create_task(_attempt(stand, call))
    assert time.monotonic() - began < 8
    await _nothing_left(stand, before)


async def test_an_upload_that_nobody_takes(stand: Stand) -> None:
    """A guest that reads nothing and says nothing."""
    done = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal done
        while True:
            done += 1
            yield bytes(_MB)

    stand.guest.script = Script([(1.5, b"")], "wait")
    async with asyncio.timeout(5):
        with pytest.raises(AgentError):
            await stand.host.guest(stand.bad).write_file("/x", endless())
    assert done < 64


async def test_an_upload_whose_client_is_slow_is_not_cut(stand: Stand) -> None:
    """Silence counts only while it is the guest that is waited for."""

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0.3)
            yield bytes(600_000)

    stand.guest.script = Script([(1.2, answer(b"[]"))], "wait")
    await stand.host.guest(stand.bad).write_file("/x", slow())


async def test_a_guest_that_is_hostile_from_its_first_moment(stand: Stand) -> None:
    """At a create it is an error in time, and nothing of the machine is left."""
    other = new_sandbox_id()
    choose = Liar(5)
    stand.hostile_ports.update(range(1024, 65536))
    before = await _at_rest(stand)
    for script in (
        says(b"", ending="wait"),
        _flood(b"HTTP/1.1 204 ", _FILLER),
        says(answer(b"{}", b"401 no")),
        says(b"HTTP/1.1 200 OK\r\n\r\n"),
        choose.script(),
    ):
        stand.guest.script = script
        began = time.monotonic()
        with pytest.raises(AgentError) as caught:
            await stand.create(other)
        assert time.monotonic() - began < 15
        assert str(stand.data_dir) not in str(caught.value)
        assert not [each for each in await stand.host.sandboxes() if each.sandbox_id == other]
    assert len(list((stand.data_dir / "run").iterdir())) == 2
    await _nothing_left(stand, before)


async def test_a_token_that_is_echoed_is_not_kept(
    stand: Stand, logs: list[MutableMapping[str, object]]
) -> None:
    """The answer to /init may hold the token that the guest was just given."""
    stand.guest.script = says(answer(b"token " + b"f" * 48, b"500 x"))
    client = stand.host._sandboxes[stand.bad].machine.client
    with pytest.raises(AgentError) as caught:
        await client.set_clock("f" * 48, "")
    assert "ffff" not in str(caught.value) + (caught.value.detail or "") + str(logs)


_HEALTHY: Final = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.mark.parametrize("early", [_HEALTHY, answer(b"{}"), b"HTTP/1.1 ", b"x"])
async def test_what_comes_before_a_question_is_not_its_answer(early: bytes, stand: Stand) -> None:
    """A connection on which there was more than one answer is not used again."""
    client = stand.host._sandboxes[stand.bad].machine.client
    stand.guest.script = Script([(0, _HEALTHY), (0.05, early)], "wait")
    await client.health()
    await asyncio.sleep(0.1)
    assert stand.guest.connections == 1
    stand.guest.script = says(_HEALTHY, ending="wait")
    await client.health()
    assert stand.guest.connections == 2


@pytest.mark.parametrize(
    "whole", [_HEALTHY, answer(b"{}"), CHUNKED + chunk(b"{}") + b"0\r\n\r\n", CHUNKED + END]
)
async def test_a_connection_on_which_nothing_else_came_is_used_again(
    whole: bytes, stand: Stand
) -> None:
    client = stand.host._sandboxes[stand.bad].machine.client
    stand.guest.script = Script([(0, whole), (0.2, whole)], "wait")
    await client.call("GET", "/x")
    await client.call("GET", "/x")
    assert stand.guest.connections == 1


async def fuzz(stand: Stand, seed: int, seconds: float) -> tuple[int, float, int]:
    """Lie for so long; returns how often, the worst lag in seconds and the memory taken."""
    liar = Liar(seed)
    before = await _at_rest(stand)
    memory = Memory()
    lag = Lag()
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until:
        stand.guest.script = await asyncio.to_thread(liar.script)
        calls = [_CALLS[(count + step) % len(_CALLS)] for step in range(4)]
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(_attempt(stand, call))
        count += len(calls)
        if count % 100 == 0:
            await _served(stand)
            await asyncio.to_thread(stand.guest.hang_up)
    worst = await lag.end()
    await _nothing_left(stand, before)
    return count, worst, memory.taken


async def test_the_host_survives_random_lies_of_a_guest(
    stand: Stand, logs: list[MutableMapping[str, object]]
) -> None:
    count, worst, memory = await fuzz(stand, 20261123, _FUZZ_SEC)
    assert count > 50
    assert worst < _LAG_SEC
    assert memory < 64 * _MB
    assert sum(len(str(each)) for each in logs) < 100 * count
    await stand.host.guest(stand.good).exec(_COMMAND, timeout=20, output_limit=100)
