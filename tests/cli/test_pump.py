"""Standard input on its way to a sandbox."""

import os
import signal
import termios
import threading
from collections.abc import Iterator

import pytest

from wrenn_sandbox.cli.pump import InputPump, raw_mode, size_of, write_all
from wrenn_sandbox.client import ConnectionFailed, Size

_PATIENCE_SEC = 10


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    source, sink = os.pipe()
    yield source, sink
    for each in (source, sink):
        if _is_open(each):
            os.close(each)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_standard_input_arrives_and_ends(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    got: list[bytes] = []
    ended = threading.Event()
    with InputPump(source, got.append, ended.set):
        os.write(sink, b"data")
        os.close(sink)
        assert ended.wait(_PATIENCE_SEC)
    assert b"".join(got) == b"data"


def test_leaving_while_nothing_comes(pipe: tuple[int, int]) -> None:
    before = threading.active_count()
    files = set(os.listdir("/proc/self/fd"))
    with InputPump(pipe[0], lambda data: None):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert set(os.listdir("/proc/self/fd")) == files


def test_a_server_that_is_gone_ends_the_pump(pipe: tuple[int, int]) -> None:
    tried = threading.Event()

    def send(data: bytes) -> None:
        tried.set()
        raise ConnectionFailed("gone")

    with InputPump(pipe[0], send):
        os.write(pipe[1], b"x")
        assert tried.wait(_PATIENCE_SEC)


def test_changes_of_size(pipe: tuple[int, int]) -> None:
    told = threading.Semaphore(0)
    handler = signal.getsignal(signal.SIGWINCH)
    with InputPump(pipe[0], lambda data: None, on_resize=told.release):
        assert told.acquire(timeout=_PATIENCE_SEC)
        signal.raise_signal(signal.SIGWINCH)
        assert told.acquire(timeout=_PATIENCE_SEC)
        signal.raise_signal(signal.SIGWINCH)
        assert told.acquire(timeout=_PATIENCE_SEC)
    assert signal.getsignal(signal.SIGWINCH) == handler
    assert signal.set_wakeup_fd(-1) == -1


def test_a_terminal_is_raw_for_a_while() -> None:
    master, slave = os.openpty()
    try:
        termios.tcsetwinsize(master, (33, 77))
        assert size_of(slave) == Size(77, 33)
        before = termios.tcgetattr(slave)
        with raw_mode(slave):
            assert not termios.tcgetattr(slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        assert termios.tcgetattr(slave) == before
        with pytest.raises(ConnectionFailed), raw_mode(slave):
            raise ConnectionFailed("gone")
        assert termios.tcgetattr(slave) == before
        termios.tcsetwinsize(master, (0, 0))
        assert size_of(slave) == Size(80, 24)
    finally:
        os.close(master)
        os.close(slave)


def test_writing_to_a_slow_reader(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    os.set_blocking(sink, False)
    data = os.urandom(1_000_000)
    got = bytearray()

    def read() -> None:
        while piece := os.read(source, 65536):
            got.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    write_all(sink, data)
    os.close(sink)
    reader.join()
    assert bytes(got) == data
