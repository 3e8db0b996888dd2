"""Stages: what is measured, and whose it is."""

import asyncio

import pytest

from wrenn_sandbox.host.stages import Stages, stage
from wrenn_sandbox.wire.metrics import BUCKETS


def _names(stages: Stages) -> list[tuple[str, str, int]]:
    return [(each.operation, each.stage, sum(each.counts)) for each in stages.times()]


def test_each_time_falls_into_one_bucket() -> None:
    stages = Stages()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] * 1.5, BUCKETS[-1], BUCKETS[-1] + 1):
        stages.note("create", "slot", seconds)
    counts = [0] * (len(BUCKETS) + 1)
    counts[0], counts[1], counts[-2], counts[-1] = 2, 1, 1, 1
    [found] = stages.times()
    assert (found.operation, found.stage, found.counts) == ("create", "slot", tuple(counts))
    assert found.seconds == pytest.approx(2.5 * BUCKETS[0] + 2 * BUCKETS[-1] + 1)


async def test_a_stage_belongs_to_the_operation_that_began_its_task() -> None:
    stages = Stages()

    async def work() -> None:
        with stage("disk"):
            await asyncio.sleep(0)

    with stages.of("create"):
        task = asyncio.create_task(work())
    with stages.of("resume"):
        await work()
    await task
    await work()
    assert sorted(_names(stages)) == [("create", "disk", 1), ("resume", "disk", 1)]


def test_a_stage_that_fails_is_not_counted() -> None:
    stages = Stages()
    with stages.of("pause"), pytest.raises(OSError), stage("store"):
        raise OSError
    assert _names(stages) == []
