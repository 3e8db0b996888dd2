"""A monitor that was captured by its guest: whatever it says and writes, the server lives on.

A thread plays the monitor at the other end of a real control socket, and a process with a
private mapping plays the one whose memory is read.
"""

import asyncio
import base64
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.memory import diff, pages
from wrenn_sandbox.host.memory.pages import PAGE
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.vmm.files import LOG_LIMIT, read_state, shorten_log, tails
from wrenn_sandbox.host.vmm.qemu import monitor as monitor_module
from wrenn_sandbox.host.vmm.qemu import process as qemu_process
from wrenn_sandbox.host.vmm.qemu import qmp
from wrenn_sandbox.host.vmm.qemu.monitor import Monitor, listen
from wrenn_sandbox.host.vmm.qemu.process import (
    Running,
    connected,
    or_no_end,
    unless_ended,
)

_MB = 1 << 20
_GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}\r\n'
_READY = b'{"return": {}, "id": 1}\r\n'

Play = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_STATUS_SEC", 0.5)
    monkeypatch.setattr(qmp.Session.execute, "__defaults__", (None, 0.5))
    monkeypatch.setattr(monitor_module.Monitor._execute, "__defaults__", (None, 0.5))
    monkeypatch.setattr(monitor_module, "ANSWER_SEC", 0.5)


@asynccontextmanager
async def played(path: Path, play: Play) -> AsyncIterator[Path]:
    """A control socket behind which a thread does `play` on the first connection."""
    listener = listen(path)

    def serve() -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                play(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        await asyncio.to_thread(thread.join, 20)
        assert not thread.is_alive()


def negotiate(connection: socket.socket, greeting: bytes = _GREETING) -> None:
    connection.sendall(greeting)
    connection.recv(65536)
    connection.sendall(_READY)


def says(*parts: bytes, then_waits: bool = True) -> Play:
    """Sends these bytes; then drains what comes, or closes."""

    def play(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        while then_waits and connection.recv(65536):
            pass

    return play


def floods(first: bytes, endless: bytes) -> Play:
    def play(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(endless)

    return play


def answers(answer: Callable[[int], bytes]) -> Play:
    """Negotiates and then answers each command with these bytes."""

    def play(connection: socket.socket) -> None:
        connection.sendall(_GREETING)
        with connection.makefile("rb") as commands:
            for line in commands:
                command = json.loads(line)
                if command["execute"] == "qmp_capabilities":
                    connection.sendall(_READY)
                else:
                    connection.sendall(answer(command["id"]))

    return play


class Lag:
    """The most processor time that the event loop's thread took between two looks at it."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.002)
            self.worst = max(self.worst, time.thread_time() - before)

    async def end(self) -> float:
        await asyncio.sleep(0.01)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self.worst


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


_NO_MONITORS: dict[str, Play] = {
    "nothing": says(),
    "end": says(then_waits=False),
    "endless line": floods(b"", b"x" * 65536),
    "endless greeting": floods(b'{"QMP": "', b"x" * 65536),
    "empty lines": floods(b"", b"\n" * 65536),
    "not JSON": says(b"{]\n"),
    "no object": says(b"[]\n"),
    "no UTF-8": says(b'{"QMP": "\xff\xfe"}\n'),
    "deep": says(b'{"QMP":' + b"[" * 100_000 + b"\n"),
    "greeting only": says(_GREETING),
    "greetings": floods(b"", _GREETING * 100),
    "refuses": says(_GREETING, b'{"error": {"class": "x", "desc": "no"}, "id": 1}\n'),
    "error without id": says(_GREETING, b'{"error": {"desc": "no"}}\n'),
    "wrong id": says(_GREETING, b'{"return": {}, "id": 99}\n'),
    "id of another type": says(_GREETING, b'{"return": {}, "id": {}}\n'),
    "huge id": says(_GREETING, b'{"return": {}, "id": ' + b"9" * 100_000 + b"}\n"),
    "events": floods(_GREETING, b'{"event": "STOP", "data": {}}\n' * 1000),
}


@pytest.mark.parametrize("name", _NO_MONITORS)
async def test_what_is_no_monitor(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "_CONNECT_SEC", 0.5)
    before, tasks = _resident(), len(asyncio.all_tasks())
    open_before = len(os.listdir("/proc/self/fd"))
    lag = Lag()
    async with played(tmp_path / "s", _NO_MONITORS[name]) as path:
        began = time.monotonic()
        with pytest.raises(HostFailure) as caught:
            await Monitor.connect(path)
        assert time.monotonic() - began < 10
        assert str(tmp_path) not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) <= open_before
    assert caplog.messages == []
    assert await lag.end() < 0.1
    assert len(asyncio.all_tasks()) == tasks
    assert _resident() - before < 16 * _MB


_LIES: dict[str, Callable[[int], bytes]] = {
    "nothing": lambda _: b"",
    "refused": lambda n: b'{"error": {"desc": "no"}, "id": %d}\n' % n,
    "endless refusal": lambda n: b'{"error": {"desc": "%b"}, "id": %d}\n' % (b"x" * 200_000, n),
    "another's": lambda n: b'{"return": {"status": "running"}, "id": %d}\n' % (n + 1),
    "before": lambda n: b'{"return": {"status": "running"}, "id": %d}\n' % (n - 1),
    "number": lambda n: b'{"return": 5, "id": %d}\n' % n,
    "null": lambda n: b'{"return": null, "id": %d}\n' % n,
    "none": lambda n: b'{"id": %d}\n' % n,
    "list": lambda n: b'{"return": [[]], "id": %d}\n' % n,
    "object": lambda n: b'{"return": {"status": {}}, "id": %d}\n' % n,
    "deep": lambda n: b'{"return": %b, "id": %d}\n' % (b"[" * 100_000, n),
    "huge": lambda n: b'{"return": "%b", "id": %d}\n' % (b"x" * 300_000, n),
    "surrogate": lambda n: b'{"return": {"status": "\\ud800"}, "id": %d}\n' % n,
    "not JSON": lambda n: b"\0\xff\n",
    "no line": lambda n: b'{"return": ',
}


@pytest.mark.parametrize("name", _LIES)
async def test_answers_that_are_lies(name: str, tmp_path: Path) -> None:
    """A lie is an error, in time; a session that is out of step is of no further use."""
    async with played(tmp_path / "s", answers(_LIES[name])) as path:
        monitor = await Monitor.connect(path)
        with pytest.raises(HostFailure) as caught:
            await monitor.status()
        assert len(caught.value.detail or "") < 1000
        for call in (monitor.stop, monitor.cont, monitor.console):
            with suppress(HostFailure):
                async with asyncio.timeout(5):
                    await call()
        await monitor.close()
        await monitor.close()


async def test_a_flood_of_events_slows_nobody_else_down(tmp_path: Path) -> None:
    """Nobody waits for them, so they are dropped; commands are answered none the less."""
    event = b'{"event": "BLOCK_IO_ERROR", "data": {"x": 1}}\n' * 2000

    def play(connection: socket.socket) -> None:
        negotiate(connection)
        connection.settimeout(0.001)
        stop = time.monotonic() + 1.5
        number = itertools.count(2)
        while time.monotonic() < stop:
            connection.settimeout(None)
            connection.sendall(event)
            connection.settimeout(0.001)
            with suppress(TimeoutError):
                if b"query-status" in connection.recv(65536):
                    connection.settimeout(None)
                    line = b'{"return": {"status": "running"}, "id": %d}\n' % next(number)
                    connection.sendall(line)

    before, cpu = _resident(), time.thread_time()
    lag = Lag()
    async with played(tmp_path / "s", play) as path:
        monitor = await Monitor.connect(path)
        waiting = asyncio.create_task(monitor.shutdown())
        await asyncio.sleep(1.0)
        with suppress(HostFailure):
            await monitor.status()
        assert not waiting.done()
        await monitor.close()
        with pytest.raises(HostFailure):
            await waiting
    assert await lag.end() < 0.1
    assert time.thread_time() - cpu < 0.8
    assert _resident() - before < 16 * _MB


async def test_what_is_taken_at_once_is_bounded(tmp_path: Path) -> None:
    """Messages wait for their turn, and a message that does not end is none."""

    def play(connection: socket.socket) -> None:
        negotiate(connection)
        connection.recv(65536)

    async with played(tmp_path / "s", play) as path:
        assert path.stat().st_mode & 0o777 == 0o600
        session = (await Monitor.connect(path))._session
        events = b'{"event": "X"}\n' * 20_000
        session.data_received(events)
        assert len(session._buffer) > len(events) // 2
        assert session._failure is None
        await session.close()
    async with played(tmp_path / "s", play) as path:
        session = (await Monitor.connect(path))._session
        session.data_received(b"x" * (qmp.LINE_LIMIT - 1))
        assert session._failure is None
        session.data_received(b"x")
        assert "endless" in str(session._failure)
        await session.close()


async def test_events_that_nobody_waits_for_are_not_kept(tmp_path: Path) -> None:
    """An honest monitor tells of something for years."""
    event = b'{"event": "RTC_CHANGE", "data": {"offset": 1}}\n'

    def play(connection: socket.socket) -> None:
        negotiate(connection)
        connection.sendall(event * 20_000)
        connection.sendall(b'{"return": {"status": "running"}, "id": 2}\n')
        connection.recv(65536)

    async with played(tmp_path / "s", play) as path:
        monitor = await Monitor.connect(path)
        await asyncio.sleep(0.3)
        session = monitor._session
        assert not session._listeners
        assert len(session._buffer) <= 2 * qmp.LINE_LIMIT
        await monitor.close()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"guest": true, "reason": "guest-shutdown"}', "SHUTDOWN guest-shutdown"),
        (b'{"reason": "/etc/shadow \\u001b[2J"}', "SHUTDOWN"),
        (b'{"reason": "' + b"x" * 10_000 + b'"}', "SHUTDOWN"),
        (b'{"reason": 5}', "SHUTDOWN"),
        (b"null", "SHUTDOWN"),
        (b"[[[]]]", "SHUTDOWN"),
    ],
)
async def test_a_reason_is_one_of_qemu_s_words(data: bytes, expected: str, tmp_path: Path) -> None:
    """It is shown to callers."""
    line = b'{"event": "SHUTDOWN", "data": %b}\n' % data
    gate = threading.Event()

    def play(connection: socket.socket) -> None:
        negotiate(connection)
        gate.wait(5)
        connection.sendall(line)
        connection.recv(65536)

    async with played(tmp_path / "s", play) as path:
        monitor = await Monitor.connect(path)
        waiting = asyncio.create_task(monitor.shutdown())
        await asyncio.sleep(0)
        gate.set()
        async with asyncio.timeout(5):
            assert await waiting == expected
        await monitor.close()


async def test_a_console_that_is_too_long_is_cut(tmp_path: Path) -> None:
    text = base64.b64encode(os.urandom(150_000))

    def play(number: int) -> bytes:
        return b'{"return": "%b", "id": %d}\n' % (text, number)

    async with played(tmp_path / "s", answers(play)) as path:
        monitor = await Monitor.connect(path)
        assert len(await monitor.console()) == 64 * 1024
        await monitor.close()


async def test_a_load_after_which_nothing_is_heard(tmp_path: Path) -> None:
    def play(number: int) -> bytes:
        return b'{"return": {}, "id": %d}\n' % number

    async with played(tmp_path / "s", answers(play)) as path:
        monitor = await Monitor.connect(path)
        async with asyncio.timeout(5):
            with pytest.raises(HostFailure) as caught:
                await monitor.load(3)
        assert caught.value.detail is not None
        assert caught.value.detail.endswith("s after loading")
        await monitor.close()


@pytest.mark.parametrize("seed", range(4))
async def test_garbled_talk_of_a_vmm_is_refused(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of real messages, mutated, in pieces of any size."""
    choose = random.Random(seed)
    monkeypatch.setattr(monitor_module, "_STATUS_SEC", 0.05)
    monkeypatch.setattr(monitor_module, "_CONNECT_SEC", 0.05)
    words = [
        _GREETING,
        _READY,
        b'{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}\n',
        b'{"event": 5}\n',
        b'{"return": {"status": "running"}, "id": 2}\n',
        b'{"return": "QUJD", "id": 3}\n',
        b'{"error": {"class": "GenericError", "desc": "x"}, "id": 2}\n',
        b'{"timestamp": {"seconds": 1e400}, "event": "RESUME"}\n',
        b'{"id": null, "return": {}}\n',
        b"[" * 2000,
        b"\xff\xfe\0",
    ]
    for number in range(25):
        data = bytearray(_GREETING + _READY if choose.random() < 0.7 else b"")
        for _ in range(choose.randint(1, 8)):
            word = bytearray(choose.choice(words))
            if choose.random() < 0.4:
                word[choose.randrange(len(word))] = choose.randrange(256)
            data += word
        parts = [bytes(data[at : at + 17]) for at in range(0, len(data), 17)]
        ends = says(*parts, then_waits=choose.random() < 0.5)
        async with played(tmp_path / f"s{number}", ends) as path:
            with suppress(HostFailure):
                async with asyncio.timeout(5):
                    monitor = await Monitor.connect(path)
                    for call in (monitor.status, monitor.console):
                        with suppress(HostFailure):
                            await call()
                    await monitor.close()


class Process:
    """A process with a private mapping of an image, like a monitor."""

    def __init__(self, base: Path) -> None:
        script = Path(__file__).parents[1] / "support" / "private_mapping.py"
        self.child = subprocess.Popen(
            [sys.executable, str(script), str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.child.stdout is not None
        self.low = int(self.child.stdout.readline())

    def fill(self, first: int, count: int) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(f"fill {first} {count} 7", file=self.child.stdin, flush=True)
        self.child.stdout.readline()

    def mapping(self, count: int) -> pages.Mapping:
        return pages.Mapping(self.child.pid, self.low, self.low + count * PAGE)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    base = tmp_path / "img-x" / "memory"
    base.parent.mkdir()
    base.write_bytes(bytes(1000 * PAGE))
    process = Process(base)
    yield process
    process.child.kill()
    process.child.communicate()


def test_a_monitor_that_maps_less_than_it_should(process: Process, tmp_path: Path) -> None:
    """Its mapping is looked for by name and size, and what is behind it is not read."""
    process.fill(0, 1000)
    with pytest.raises(LookupError):
        pages.find_mapping(process.child.pid, "img-x/memory", 2000 * PAGE)
    with pytest.raises(OSError):
        pages.read(process.mapping(200_000), [pages.Run(190_000, 1)], memoryview(bytearray(PAGE)))


def test_a_monitor_that_ends_while_it_is_read(process: Process, tmp_path: Path) -> None:
    process.fill(0, 1000)
    mapping = process.mapping(1000)
    owned = pages.own_pages(mapping)
    process.child.kill()
    process.child.wait()
    with pytest.raises(OSError):
        pages.read(mapping, owned, memoryview(bytearray(1000 * PAGE)))
    for what in (lambda: pages.own_pages(mapping), lambda: diff.capture(mapping, tmp_path)):
        with pytest.raises(OSError):
            what()
    with pytest.raises(OSError):
        pages.find_mapping(process.child.pid, "memory", 1000 * PAGE)


async def test_a_pid_that_may_be_another_s_by_now(process: Process, tmp_path: Path) -> None:
    """What was read of it is not kept."""
    handle = ProcessHandle.of_child(process.child)  # type: ignore[arg-type]
    monitor = Running(handle, None, None)  # type: ignore[arg-type]
    qemu_process.require_same(monitor)
    handle.signal(9)  # type: ignore[arg-type]
    await handle.wait()
    with pytest.raises(HostFailure):
        qemu_process.require_same(monitor)
    handle.close()


def test_device_state_that_is_none(tmp_path: Path) -> None:
    state = tmp_path / "vmstate"
    state.write_bytes(b"state")
    assert read_state(state) == b"state"
    os.truncate(state, 2**40)
    began = time.monotonic()
    with pytest.raises(OSError, match="or more"):
        read_state(state)
    os.truncate(state, 0)
    with pytest.raises(OSError, match="0 bytes"):
        read_state(state)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(OSError):
        read_state(state)
    state.unlink()
    state.symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        read_state(state)
    assert time.monotonic() - began < 5


def test_logs_of_any_size_are_read_from_their_end(tmp_path: Path) -> None:
    from wrenn_sandbox.host.paths import MachineFiles

    files = MachineFiles(tmp_path)
    files.vmm_log.write_bytes(b"")
    os.truncate(files.vmm_log, 2**40)
    with files.vmm_log.open("ab") as log:
        log.write(b"\xff\x1b[2J last words")
    assert tails(files).endswith("last words")
    assert len(tails(files)) < 10_000
    assert "\x1b" not in tails(files)


async def test_a_lost_monitor_is_no_end_of_the_machine(process: Process, tmp_path: Path) -> None:
    """Its process tells of that; whoever waits on the monitor just waits."""
    handle = ProcessHandle.of_child(process.child)  # type: ignore[arg-type]

    def play(connection: socket.socket) -> None:
        negotiate(connection)
        connection.sendall(b"{]\n")
        connection.recv(65536)

    async with played(tmp_path / "s", play) as path:
        monitor = await Monitor.connect(path)
        waiting = asyncio.create_task(or_no_end(monitor.shutdown()))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        with pytest.raises(HostFailure):
            await unless_ended(Running(handle, monitor, None), monitor.stop())  # type: ignore[arg-type]
        await monitor.close()
    handle.signal(9)  # type: ignore[arg-type]
    await handle.wait()
    handle.close()


async def test_a_monitor_that_stood_still_for_a_while_is_as_good_as_before(tmp_path: Path) -> None:
    """Housekeeping asks each machine for its state: a busy host must not cost it its monitor."""
    numbers: list[int] = []

    def answer(number: int) -> bytes:
        numbers.append(number)
        if len(numbers) == 1:
            time.sleep(0.8)
        return b'{"return": {"status": "running"}, "id": %d}\n' % number

    async with played(tmp_path / "s", answers(answer)) as path:
        monitor = await Monitor.connect(path)
        with pytest.raises(HostFailure):
            await monitor.status()
        await asyncio.sleep(0.4)
        await monitor.cont()
        assert await monitor.status() == "running"
        await monitor.close()


@pytest.mark.parametrize("greeting", [_GREETING, b'{"QMP": {}}\n', b'{"QMP": {"version": 7}}\n'])
async def test_a_new_monitor_of_another_version_is_not_taken(
    greeting: bytes, process: Process, tmp_path: Path
) -> None:
    """It would continue, or store, what belongs to the one that was installed before."""
    handle = ProcessHandle.of_child(process.child)  # type: ignore[arg-type]
    open_before = len(os.listdir("/proc/self/fd"))

    def play(connection: socket.socket) -> None:
        negotiate(connection, greeting)
        connection.recv(65536)

    async with played(tmp_path / "s", play) as path:
        with pytest.raises(HostFailure) as caught:
            await connected(handle, path, (7, 0, 1))
        assert ("another version" in str(caught.value)) == (greeting is _GREETING)
    assert len(os.listdir("/proc/self/fd")) <= open_before
    async with played(tmp_path / "s", negotiate) as path:
        monitor = await connected(handle, path, (7, 0, 0))
        assert monitor.version == (7, 0, 0)
        await monitor.close()
    handle.signal(9)  # type: ignore[arg-type]
    await handle.wait()
    handle.close()


def test_a_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    """Every device that a guest breaks and resets is a line; the monitor keeps its log open."""
    path = tmp_path / "vmm.log"
    shorten_log(path)
    with path.open("ab", buffering=0) as log:
        log.write(b"short\n")
        shorten_log(path)
        assert path.read_bytes() == b"short\n"
        log.write(b"x" * LOG_LIMIT)
        shorten_log(path)
        log.write(b"goes on\n")
    assert path.read_bytes() == b"goes on\n"
