"""The agent's pure parts: times, request heads, form headers, ranges, the output log."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrenn_agent import environment
from wrenn_agent.environment import Environment, read_locale
from wrenn_agent.errors import InvalidArgument, NoSpace, RangeNotSatisfiable, from_os_error
from wrenn_agent.files import parse_range
from wrenn_agent.http import parse_head, parse_query, percent_decode
from wrenn_agent.loop import Loop
from wrenn_agent.multipart import MultipartReader, parse_parameters
from wrenn_agent.output import PIECE_OVERHEAD, Budget, OutputLog
from wrenn_agent.template import Template
from wrenn_agent.timestamps import format_time, parse_time
from wrenn_agent.users import User

_USER = User("root", 0, 0, [], "/root", "/bin/sh")


def test_the_language_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "default", tmp_path / "conf"]
    monkeypatch.setattr(environment, "_LOCALE_FILES", tuple(map(str, files)))
    found = Environment(Template())

    def lang(**given: str) -> str:
        return found.of_process(_USER, given, terminal=False)["LANG"]

    assert lang() == "C.UTF-8"
    assert lang(LANG="C") == "C"
    files[0].write_text("#  comment\nLANG=de_DE.UTF-8\nLC_TIME='sv_SE.UTF-8'\nPATH=/nowhere\n")
    found.read_locale()
    assert lang() == "de_DE.UTF-8"
    assert found.of_process(_USER, {}, terminal=True)["LC_TIME"] == "sv_SE.UTF-8"
    assert found.of_process(_USER, {}, terminal=True)["PATH"] != "/nowhere"
    files[1].write_text('export LANG="fr_FR.UTF-8"')
    found.read_locale()
    assert lang() == "fr_FR.UTF-8"
    found.variables = {"LANG": "it_IT.UTF-8"}
    assert lang() == "it_IT.UTF-8"
    assert lang(LANG="C") == "C"


@pytest.mark.parametrize(
    "content",
    [b"", b"LANG", b"LANG=", b"=x", b"LANG=a\0b", b"\xff\xfe=\n", b"LANG\0X=a", b"LANGX=a"],
)
def test_locale_files_that_say_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "locale").write_bytes(content)
    assert read_locale(str(tmp_path / "locale")) == {}
    assert read_locale(str(tmp_path)) == read_locale(str(tmp_path / "missing")) == {}


def test_a_pipe_in_the_place_of_a_locale_file_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "locale")
    assert read_locale(str(tmp_path / "locale")) == {}


@given(st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2200, 1, 1)))
def test_times_round_trip(moment: datetime.datetime) -> None:
    aware = moment.replace(tzinfo=datetime.UTC)
    parsed = parse_time(aware.isoformat())
    assert (
        parsed // 1000 == round(aware.timestamp() * 1e6)
        or abs(parsed - aware.timestamp() * 1e9) < 1e6
    )
    assert parse_time(format_time(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2000-03-01T00:00:00Z", 951868800_000000000),
        ("2024-02-29T23:59:59.5+00:00", 1709251199_500000000),
        ("2024-03-01T01:30:00.123456789123+01:30", 1709251200_123456789),
        ("2024-02-29 19:00:00-05:00", 1709251200_000000000),
        (1.5, 1_500000000),
        (3, 3_000000000),
    ],
)
def test_times_are_parsed_in_every_form(text: object, expected: int) -> None:
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    "text", ["", "2024", "2024-01-01T00:00:00", "2024-01-01T00:00:00+1", "x" * 20, True, -1, 1e300]
)
def test_times_that_are_none(text: object) -> None:
    with pytest.raises(InvalidArgument):
        parse_time(text)


@given(st.binary())
def test_any_bytes_are_a_head_or_a_clear_error(data: bytes) -> None:
    try:
        head = parse_head(data)
        assert isinstance(head.chunked, bool)
        assert head.content_length >= 0
    except InvalidArgument:
        pass


def test_query_strings_are_parsed() -> None:
    assert parse_query("a=1&b=%20+x&a=2&c&=d") == {"a": "1", "b": "  x", "c": ""}
    assert parse_query("p=%FF%zz%4") == {"p": "\udcff%zz%4"}
    assert percent_decode(b"%41%%42") == b"A%B"


def test_header_parameters_are_parsed() -> None:
    assert parse_parameters('form-data; name="a;b"; filename="c\\"d" ; x=y') == (
        "form-data",
        {"name": "a;b", "filename": 'c"d', "x": "y"},
    )
    assert parse_parameters('multipart/form-data; boundary="') == (
        "multipart/form-data",
        {"boundary": ""},
    )


class Pieces:
    """A body that comes in pieces of a given size."""

    def __init__(self, data: bytes, size: int) -> None:
        self._pieces = [data[start : start + size] for start in range(0, len(data), size)]

    async def piece(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


@given(
    contents=st.lists(st.binary(max_size=40) | st.sampled_from([b"\r\n--b", b"--b--\r\n", b"\r"])),
    size=st.integers(1, 50),
)
async def test_forms_in_pieces_of_any_size(contents: list[bytes], size: int) -> None:
    contents = [
        content for content in contents if b"\r\n--b\r\n" not in b"\r\n" + content + b"\r\n"
    ]
    contents = [content.replace(b"--b", b"--c") for content in contents]
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\n' + content + b"\r\n"
        for content in contents
    )
    reader = MultipartReader(Pieces(body + b"--b--\r\n", size), "multipart/form-data; boundary=b")
    seen: list[bytes] = []
    while (part := await reader.next_part()) is not None:
        assert part == ("n", None)
        content = b""
        while piece := await reader.piece():
            content += piece
        seen.append(content)
    assert seen == contents


@given(st.integers(0, 100), st.integers(0, 200), st.integers(0, 200))
def test_ranges_stay_inside_the_file(size: int, first: int, last: int) -> None:
    for text in (f"bytes={first}-{last}", f"bytes={first}-", f"bytes=-{last}"):
        try:
            selected = parse_range(text, size)
        except RangeNotSatisfiable:
            assert first >= size or (text.startswith("bytes=-") and (last == 0 or size == 0))
            continue
        if selected is not None:
            start, count = selected
            assert 0 <= start < start + count <= size


def test_errors_of_the_system() -> None:
    error = from_os_error(OSError(28, "No space left on device"), "file")
    assert isinstance(error, NoSpace)
    assert (error.status, error.message) == (507, "file: no space left on device")


def test_log_forgets_old_output_and_counts_its_memory() -> None:
    budget = Budget()
    log = OutputLog(Loop(), budget)
    for number in range(40):
        log.append("stdout", bytes([number]) * 65536)
    assert Budget.GENEROUS - 65536 <= budget.used <= Budget.GENEROUS + 65536
    reader = log.attach(from_start=True)
    first = log.take(reader, 1)
    assert first[0][1][0] > 20
    assert b"".join(data for _, data in log.take(reader, 10**9))[-1] == 39
    log.detach(reader)
    log.clear()
    assert budget.used == 0


def test_log_keeps_what_a_reader_has_not_taken() -> None:
    budget = Budget()
    log = OutputLog(Loop(), budget)
    reader = log.attach(from_start=False)
    pieces = [bytes([number]) * 65536 for number in range(17)]
    for piece in pieces:
        assert not log.full
        log.append("stdout", piece)
        if budget.used >= Budget.GENEROUS:
            break
    assert log.full
    taken = log.take(reader, 10**9)
    assert [data for _, data in taken] == pieces[: len(taken)]
    assert not log.full


def test_tiny_pieces_do_not_cost_much() -> None:
    budget = Budget()
    log = OutputLog(Loop(), budget)
    for _ in range(20_000):
        log.append("stdout", b"x")
    assert budget.used < 20_000 + 20 * PIECE_OVERHEAD
    reader = log.attach(from_start=True)
    for _ in range(100_000):
        log.append("stderr", b"y")
        log.take(reader, 10**9)
    assert budget.used <= Budget.GENEROUS + PIECE_OVERHEAD + 1
