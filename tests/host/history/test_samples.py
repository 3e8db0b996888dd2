"""The file that holds what a sandbox used."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wrenn_sandbox.host.history.samples import (
    FINE_SEC,
    KEPT_SEC,
    MINUTE_SEC,
    STEP_SEC,
    SampleFile,
    Stored,
)
from wrenn_sandbox.host.slot import Traffic
from wrenn_sandbox.wire.messages import Sample

_NOON = 1_793_534_400


def _stored(time: int, used: float = 10.0, memory: int | None = 100, sent: int = 0) -> Stored:
    return Stored(Sample(time=time, cpu_count=2, cpu_used_pct=used, mem_used=memory, net_sent=sent))


def _times(file: SampleFile, step: int, start: int = 0, end: int = 2**32) -> list[int]:
    return [each.time for each in file.between(start, end, step)]


@pytest.fixture
def file(tmp_path: Path) -> SampleFile:
    return SampleFile(tmp_path / "samples")


def test_before_the_first_sample_there_is_nothing(file: SampleFile, tmp_path: Path) -> None:
    assert file.between(0, 2**32, STEP_SEC) == []
    assert file.newest() is None
    assert os.listdir(tmp_path) == []


def test_samples_are_what_was_measured(file: SampleFile) -> None:
    sample = Sample(
        time=_NOON,
        cpu_count=8,
        cpu_used_pct=12.5,
        mem_total=2**40,
        mem_used=2**63,
        mem_cache=0,
        disk_total=None,
        disk_used=1,
        net_received=None,
        net_sent=3,
    )
    file.add(Stored(sample, 7, Traffic(1, 2)))
    assert file.between(_NOON, _NOON, STEP_SEC) == [sample]
    assert file.newest() == Stored(sample, 7, Traffic(1, 2))


def test_numbers_beyond_what_fits_are_kept_as_the_largest(file: SampleFile) -> None:
    file.add(_stored(_NOON, memory=2**80))
    [sample] = file.between(0, 2**32, STEP_SEC)
    assert sample.mem_used == 2**64 - 2


def test_the_last_hour_is_kept_in_steps_and_the_day_in_minutes(
    file: SampleFile, tmp_path: Path
) -> None:
    begin = _NOON - 2 * KEPT_SEC
    for time in range(begin, begin + 2 * MINUTE_SEC, STEP_SEC):
        file.add(_stored(time))
    for time in range(_NOON - 2 * FINE_SEC, _NOON + STEP_SEC, STEP_SEC):
        file.add(_stored(time))
    assert _times(file, STEP_SEC) == list(
        range(_NOON - FINE_SEC + STEP_SEC, _NOON + STEP_SEC, STEP_SEC)
    )
    minutes = _times(file, MINUTE_SEC, _NOON - KEPT_SEC)
    assert minutes == list(range(_NOON - 2 * FINE_SEC, _NOON + 1, MINUTE_SEC))
    assert (tmp_path / "samples").stat().st_size < 256 * 1024


def test_a_minute_is_the_mean_of_its_samples(file: SampleFile) -> None:
    for n, memory in enumerate((100, None, 200)):
        file.add(_stored(_NOON + n * STEP_SEC, used=10.0 * n, memory=memory, sent=n))
        [minute] = file.between(0, 2**32, MINUTE_SEC)
    assert (minute.time, minute.cpu_used_pct, minute.mem_used) == (_NOON, 10.0, 150)
    assert (minute.mem_cache, minute.net_sent) == (None, 2)


def test_a_time_has_both_its_ends(file: SampleFile) -> None:
    for n in range(5):
        file.add(_stored(_NOON + n * STEP_SEC))
    assert _times(file, STEP_SEC, _NOON + 5, _NOON + 15) == [_NOON + 5, _NOON + 10, _NOON + 15]


def test_what_was_half_written_is_left_out(file: SampleFile, tmp_path: Path) -> None:
    for n in range(3):
        file.add(_stored(_NOON + n * STEP_SEC))
    data = bytearray((tmp_path / "samples").read_bytes())
    at = data.index((_NOON + STEP_SEC).to_bytes(4, "little"))
    data[at + 20] ^= 1
    (tmp_path / "samples").write_bytes(data)
    assert _times(file, STEP_SEC) == [_NOON, _NOON + 2 * STEP_SEC]
    file.add(_stored(_NOON + 3 * STEP_SEC))
    assert _times(file, STEP_SEC)[-1] == _NOON + 3 * STEP_SEC


@given(st.binary(max_size=4096), st.integers(1, 2**32 - 1))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_a_file_of_samples(tmp_path: Path, data: bytes, time: int) -> None:
    (tmp_path / "samples").write_bytes(data)
    file = SampleFile(tmp_path / "samples")
    assert file.newest() is None
    file.add(_stored(time))
    assert _times(file, STEP_SEC) == [time]


def test_traffic_is_summed_up_over_the_lives_of_a_sandbox() -> None:
    first = Stored(
        Sample(time=1, cpu_count=1, cpu_used_pct=0, net_received=100, net_sent=10),
        life=1,
        counted=Traffic(60, 5),
    )
    assert first.added(1, Traffic(70, 5)) == Traffic(110, 10)
    assert first.added(2, Traffic(70, 5)) == Traffic(170, 15)
    assert first.added(1, Traffic(0, 0)) == Traffic(100, 10)
