"""Room for machines: decided one after the other, with what was promised counted."""

import asyncio
from pathlib import Path

import pytest

from wrenn_sandbox.errors import NoCapacity
from wrenn_sandbox.host import admission
from wrenn_sandbox.host.admission import Admission, Free
from wrenn_sandbox.ids import SandboxId, new_operation_id, new_sandbox_id
from wrenn_sandbox.settings import Settings

_OPERATION = new_operation_id()


class Machine:
    """A machine of 10 GiB with 6 free, where sandboxes run."""

    def __init__(self) -> None:
        self.free = Free(memory_total_mb=10_240, memory_free_mb=6144, disk_free_mb=4096)
        self.running: dict[SandboxId, int] = {}
        self.asked_for: list[int] = []
        self.room_to_make = 0

    def measure(self, _: Path) -> Free:
        return self.free

    async def make_room(self, missing_mb: int) -> None:
        self.asked_for.append(missing_mb)
        self.free = Free(
            memory_total_mb=self.free.memory_total_mb,
            memory_free_mb=self.free.memory_free_mb + self.room_to_make,
            disk_free_mb=self.free.disk_free_mb,
        )

    def admission(self, **settings: object) -> Admission:
        values = {"data_dir": Path("/none"), "memory_reserve_mb": 1024, "disk_reserve_mb": 1024}
        given = Settings.model_validate({**values, **settings})
        return Admission(given, lambda: self.running, self.make_room)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(admission, "measure", machine.measure)
    return machine


async def _reserved(admission: Admission, number: int, memory_mb: int) -> list[SandboxId]:
    """Those of many requests at once that got their machine."""
    ids = [new_sandbox_id() for _ in range(number)]
    answers = await asyncio.gather(
        *(admission.reserve(id, _OPERATION, memory_mb) for id in ids), return_exceptions=True
    )
    assert all(answer is None or isinstance(answer, NoCapacity) for answer in answers)
    return [id for id, answer in zip(ids, answers, strict=True) if answer is None]


async def test_promises_count_before_their_memory_is_taken(machine: Machine) -> None:
    admission = machine.admission()
    first = await _reserved(admission, 20, 1024)
    assert len(first) == 5, "6 GiB are free and 1 is kept"
    admission.release(first[0], new_operation_id())
    assert await _reserved(admission, 1, 1024) == [], "another operation has promised nothing"
    admission.release(first[0], _OPERATION)
    admission.release(first[0], _OPERATION)
    assert len(await _reserved(admission, 3, 1024)) == 1


async def test_what_all_may_come_to_take_is_bounded(machine: Machine) -> None:
    machine.running = {new_sandbox_id(): 1024 for _ in range(16)}
    admission = machine.admission(memory_overcommit=2.0)
    assert len(await _reserved(admission, 5, 1024)) == 2, "18 GiB are twice what there is"
    assert not await admission.has_room(1024)
    machine.running.popitem()
    assert await admission.has_room(1024)
    unbounded = machine.admission(memory_overcommit=0)
    assert len(await _reserved(unbounded, 5, 1024)) == 5


async def test_a_machine_that_runs_is_not_counted_twice(machine: Machine) -> None:
    admission = machine.admission(memory_overcommit=1.0, max_running=2)
    [id] = await _reserved(admission, 1, 4096)
    machine.running[id] = 4096
    await admission.reserve(id, _OPERATION, 4096)
    admission.release(id, _OPERATION)
    assert len(await _reserved(admission, 2, 1024)) == 1, "two may run"


async def test_the_number_of_machines_is_bounded(machine: Machine) -> None:
    machine.running = {new_sandbox_id(): 64}
    assert len(await _reserved(machine.admission(max_running=4), 9, 64)) == 3


async def test_room_is_made_where_there_is_too_little(machine: Machine) -> None:
    admission = machine.admission()
    machine.room_to_make = 2048
    assert len(await _reserved(admission, 1, 6144)) == 1
    assert machine.asked_for == [1024]
    assert await _reserved(admission, 1, 6144) == []


async def test_no_room_is_made_where_that_would_not_help(machine: Machine) -> None:
    machine.running = {new_sandbox_id(): 9216}
    assert await _reserved(machine.admission(memory_overcommit=1.0), 1, 1024) == []
    machine.running.clear()
    machine.free = Free(memory_total_mb=10_240, memory_free_mb=1024, disk_free_mb=1023)
    assert await _reserved(machine.admission(), 1, 1024) == []
    assert machine.asked_for == []


async def test_no_disk_no_machine(machine: Machine) -> None:
    machine.free = Free(memory_total_mb=10_240, memory_free_mb=6144, disk_free_mb=1023)
    with pytest.raises(NoCapacity, match="disk space") as caught:
        await machine.admission().reserve(new_sandbox_id(), _OPERATION, 64)
    assert caught.value.retry_after


async def test_a_part_of_the_reserve_may_be_given_up(machine: Machine) -> None:
    settings = Settings(data_dir=Path("/none"), disk_reserve_mb=1024)
    admission.require_disk(settings, 3072)
    with pytest.raises(NoCapacity):
        admission.require_disk(settings, 3073)
    admission.require_disk(settings, 3840, share=0.25)
    with pytest.raises(NoCapacity):
        admission.require_disk(settings, 3841, share=0.25)


async def test_nothing_is_promised_by_a_host_that_closes(machine: Machine) -> None:
    admission = machine.admission()
    admission.close()
    assert not await admission.has_room(64)
    with pytest.raises(NoCapacity, match="shutting down"):
        await admission.reserve(new_sandbox_id(), _OPERATION, 64)
