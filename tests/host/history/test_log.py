"""What is kept of a guest's console."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wrenn_sandbox.host.history.log import FILE_BYTES, LINE_BYTES, LINES_AT_ONCE, SandboxLog
from wrenn_sandbox.wire.messages import LogLine, LogSource

_NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


@pytest.fixture
def log(tmp_path: Path) -> SandboxLog:
    return SandboxLog(tmp_path / "sb-1")


def _read(
    log: SandboxLog, cursor: int | None = None, *, backward: bool = False, limit: int = 1000
) -> list[LogLine]:
    return log.read(cursor, backward=backward, limit=limit)


def _texts(log: SandboxLog) -> list[str]:
    return [each.text for each in _read(log)]


def test_nothing_is_kept_of_a_silent_guest(log: SandboxLog, tmp_path: Path) -> None:
    log.add(b"", _NOW)
    log.add(b"\r\n\n", _NOW)
    assert _read(log) == []
    assert list(tmp_path.iterdir()) == []


def test_lines_have_number_time_and_source(log: SandboxLog) -> None:
    log.add(b"[    1.234567] BUG\r\nwrenn-agent: Traceback\nlogin: root\n", _NOW)
    assert _read(log) == [
        LogLine(number=1, at=_NOW, source=LogSource.KERNEL, text="[    1.234567] BUG"),
        LogLine(number=2, at=_NOW, source=LogSource.AGENT, text="Traceback"),
        LogLine(number=3, at=_NOW, source=LogSource.CONSOLE, text="login: root"),
    ]


def test_a_line_is_put_together_from_its_pieces(log: SandboxLog) -> None:
    log.add(b"one ", _NOW)
    assert _read(log) == []
    log.add(b"line\nanother", _NOW)
    assert _texts(log) == ["one line"]
    log.add(b"", _NOW)
    assert _texts(log) == ["one line", "another"]
    log.add(b"the end", _NOW, ended=True)
    assert _texts(log)[-1] == "the end"


def test_numbers_go_on_with_another_server(log: SandboxLog, tmp_path: Path) -> None:
    log.add(b"one\n", _NOW)
    again = SandboxLog(tmp_path / "sb-1")
    again.add(b"two\n", _NOW + timedelta(days=1))
    assert [(each.number, each.text) for each in _read(again)] == [(1, "one"), (2, "two")]


def test_pages_go_forward_and_backward(log: SandboxLog) -> None:
    log.add(b"".join(b"%d\n" % n for n in range(1, 8)), _NOW)
    assert [each.number for each in _read(log, limit=3)] == [1, 2, 3]
    assert [each.number for each in _read(log, 3, limit=3)] == [4, 5, 6]
    assert _read(log, 7) == _read(log, 2**60) == []
    assert [each.number for each in _read(log, backward=True, limit=3)] == [7, 6, 5]
    assert [each.number for each in _read(log, 3, backward=True)] == [2, 1]
    assert _read(log, 1, backward=True) == []


def test_a_flood_loses_its_oldest_lines_and_says_so(log: SandboxLog, tmp_path: Path) -> None:
    for n in range(30):
        log.add(b"".join(b"%d %s\n" % (n, b"x" * 100) for _ in range(600)), _NOW)
    files = list((tmp_path / "sb-1").iterdir())
    assert sum(each.stat().st_size for each in files) < 2.5 * FILE_BYTES
    found = _read(log, limit=1)
    assert found[0].source is LogSource.HOST
    lost = found[0].number
    assert found[0].text == f"{lost} earlier lines are not kept any more"
    assert _read(log, lost, limit=1)[0].number == lost + 1
    assert _read(log, backward=True, limit=1)[0].number == 30 * 600
    every = _read(log, backward=True, limit=10**6)
    assert (every[-1].number, every[-1].source) == (lost, LogSource.HOST)
    assert _read(log, lost, backward=True) == []
    [hole, *_] = _read(log, lost - 5)
    assert hole.text == "5 earlier lines are not kept any more"


def test_of_too_many_lines_at_once_the_last_are_kept(log: SandboxLog) -> None:
    log.add(b"".join(b"%d\n" % n for n in range(5000)), _NOW)
    found = _read(log, limit=10**6)
    assert len(found) == LINES_AT_ONCE + 1
    assert found[0].source is LogSource.HOST
    assert found[-1].text == "4999"


def test_endless_lines_are_divided(log: SandboxLog) -> None:
    log.add(b"x" * 3 * LINE_BYTES + b"\n", _NOW)
    for _ in range(3):
        log.add(b"y" * LINE_BYTES, _NOW)
    assert [len(each) for each in _texts(log)] == [LINE_BYTES] * 6


@given(st.lists(st.binary(max_size=200), max_size=5))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_kept_as_text(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    log = SandboxLog(tmp_path_factory.mktemp("log"))
    for each in pieces:
        log.add(each, _NOW)
    log.add(b"", _NOW)
    for line in _read(log):
        line.text.encode("utf-8")
        assert "\n" not in line.text
    wanted = [each for each in b"".join(pieces).replace(b"\r", b"\n").split(b"\n") if each.strip()]
    assert len(_read(log)) >= len(wanted)


def test_what_cannot_be_read_is_left_out(log: SandboxLog, tmp_path: Path) -> None:
    log.add(b"one\ntwo\n", _NOW)
    file = tmp_path / "sb-1" / "log"
    file.write_bytes(file.read_bytes() + b'[3,1,"console","\xff"]\n[4,1,"nobody","x"]\n[5,')
    assert _texts(SandboxLog(tmp_path / "sb-1")) == ["one", "two"]
