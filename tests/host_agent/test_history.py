"""What a host measures of its sandboxes and keeps of their consoles, on the fake driver."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog

from support.host_stand import Stand
from wrenn_sandbox.errors import AgentError
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.guest.client import GuestClient
from wrenn_sandbox.host.history import recorder
from wrenn_sandbox.host.history.samples import KEPT_SEC, STEP_SEC
from wrenn_sandbox.ids import SandboxId, new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import GuestMetrics, LogLine, LogSource, Sample

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    """A host that measures when a test says so, and a sandbox that runs."""
    monkeypatch.setattr(recorder.Recorder, "start", lambda _: None)
    monkeypatch.setattr(recorder, "_SPREAD_SEC", 0.01)
    settings = Settings(data_dir=tmp_path / "data", driver="fake", hot_pool_size=0)
    stand = Stand(settings)
    await stand.start()
    await stand.create()
    yield stand
    await stand.host.destroy(stand.id, new_operation_id())
    await stand.host.close()


def _now() -> int:
    return round(time.time()) // STEP_SEC * STEP_SEC


async def _measure(host: HostAgent, *times: int) -> None:
    for each in times:
        await host._recorder.measure(each)


async def _samples(stand: Stand) -> list[Sample]:
    now = _now()
    return list((await stand.host.samples(stand.id, now - 1800, now + 1800)).samples)


def _say(stand: Stand, text: bytes) -> None:
    """What the guest would write to its console."""
    with stand.sandbox.machine.spec.files.vmm_log.open("ab") as console:
        console.write(text)


async def _log(host: HostAgent, sandbox_id: SandboxId) -> list[LogLine]:
    return await host.log(sandbox_id, None, backward=False, limit=1000)


async def test_what_runs_is_measured(stand: Stand) -> None:
    now = _now()
    await _measure(stand.host, now - 10, now - 5, now)
    samples = await _samples(stand)
    assert [each.time for each in samples] == [now - 5, now]
    for each in samples:
        assert each.cpu_count == 1
        assert 0 <= each.cpu_used_pct <= 100
        assert each.mem_total == 256 << 20
        assert each.mem_used is not None
        assert 0 < each.mem_used <= each.mem_total
        assert each.disk_used is not None
        assert 0 < each.disk_used <= (each.disk_total or 0)
        assert each.net_received is None  # nobody counts what goes over the loopback
    assert await stand.host.last_sample(stand.id) == samples[-1]


async def test_history_survives_pause_restart_and_end(stand: Stand) -> None:
    now = _now()
    await _measure(stand.host, now - 60, now - 55)
    _say(stand, b"before the pause\n")
    await stand.pause()
    await _measure(stand.host, now - 50)
    await stand.resume()
    await _measure(stand.host, now - 45, now - 40)
    await stand.host.close()
    await stand.start()
    await _measure(stand.host, now - 35, now - 30)
    times = [now - 55, now - 40, now - 30]
    assert [each.time for each in await _samples(stand)] == times
    _say(stand, b"after the restart\nthe last")
    await stand.host.destroy(stand.id, new_operation_id())
    assert [each.time for each in await _samples(stand)] == times
    texts = [each.text for each in await _log(stand.host, stand.id)]
    assert [each for each in texts if "pause" in each or "restart" in each] == [
        "before the pause",
        "after the restart",
    ]
    assert texts[-1] == "the last"


async def test_a_line_can_be_read_at_once(stand: Stand) -> None:
    _say(stand, b"\x1b[2Jhello \xff\n")
    found = await _log(stand.host, stand.id)
    assert found[-1].source is LogSource.CONSOLE
    assert found[-1].text == "\x1b[2Jhello \N{REPLACEMENT CHARACTER}"
    assert abs((datetime.now(UTC) - found[-1].at).total_seconds()) < 600


async def test_a_silent_guest_is_measured_from_outside_and_asked_rarely(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = _now(), 0

    async def hang(_: GuestClient) -> GuestMetrics:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        raise AssertionError

    await _measure(stand.host, now - 300)
    monkeypatch.setattr(recorder, "_ANSWER_SEC", 0.01)
    monkeypatch.setattr(GuestClient, "metrics", hang)
    for n in range(13):
        await _measure(stand.host, now - 295 + n * STEP_SEC)
    samples = await _samples(stand)
    assert len(samples) == 13
    assert asked == 2
    assert {each.mem_used for each in samples} == {None}
    assert all(0 <= each.cpu_used_pct <= 100 for each in samples)


async def test_a_guest_that_lies_is_kept_within_what_can_be(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lie(_: GuestClient) -> GuestMetrics:
        most = 2**63 - 1
        return GuestMetrics(
            cpu_count=most,
            cpu_used_pct=1e6,
            mem_total=most,
            mem_used=most,
            mem_cache=most,
            disk_used=most,
            disk_total=5,
        )

    monkeypatch.setattr(GuestClient, "metrics", lie)
    now = _now()
    await _measure(stand.host, now - 5, now)
    [sample] = await _samples(stand)
    memory = 256 << 20
    assert (sample.mem_total, sample.mem_used, sample.mem_cache) == (memory, memory, memory)
    assert (sample.disk_total, sample.disk_used, sample.cpu_count) == (5, 5, 1)


async def test_one_guest_that_fails_keeps_no_other_back(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Stand(stand.settings)
    other.host = stand.host
    await other.create()
    bad = stand.sandbox.machine.client
    real = GuestClient.metrics

    async def fail(client: GuestClient) -> GuestMetrics:
        if client is bad:
            raise AgentError("no")
        return await real(client)

    monkeypatch.setattr(GuestClient, "metrics", fail)
    now = _now()
    await _measure(stand.host, now - 5, now)
    assert (await _samples(stand))[-1].mem_used is None
    assert (await _samples(other))[-1].mem_used
    await other.host.destroy(other.id, new_operation_id())


async def test_long_times_are_shown_by_the_minute(stand: Stand) -> None:
    now = _now() // 60 * 60
    await _measure(stand.host, *(now - 120 + n * STEP_SEC for n in range(24)))
    fine = await stand.host.samples(stand.id, now - 600, now + 600)
    coarse = await stand.host.samples(stand.id, 0, 2**40)
    assert (fine.step_sec, len(fine.samples)) == (5, 23)
    assert (coarse.step_sec, [each.time for each in coarse.samples]) == (60, [now - 120, now - 60])


async def test_an_unknown_sandbox_has_no_history(stand: Stand) -> None:
    unknown = SandboxId("sb-unknown")
    assert (await stand.host.samples(unknown, 0, 2**40)).samples == ()
    assert await stand.host.last_sample(unknown) is None
    assert await _log(stand.host, unknown) == []


async def test_history_goes_a_day_after_the_end(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = stand.settings.data_dir / "history"
    now = _now()
    await _measure(stand.host, now - 5, now)
    for n, name in enumerate(("sb-old", "sb-recent", "sb-large")):
        (histories / name).mkdir()
        (histories / name / "log").write_bytes(b"x" * 8192)
        age = KEPT_SEC + 60 if name == "sb-old" else 60 + n
        for each in (histories / name / "log", histories / name):
            os.utime(each, (now - age, now - age))
    old = now - 2 * KEPT_SEC
    for each in (histories / stand.id / "samples", histories / stand.id):
        os.utime(each, (old, old))
    await stand.host._recorder.tidy()
    assert set(os.listdir(histories)) == {stand.id, "sb-recent", "sb-large"}
    monkeypatch.setattr(recorder, "ENDED_BYTES", 20_000)
    await stand.host._recorder.tidy()
    assert set(os.listdir(histories)) == {stand.id, "sb-recent"}
