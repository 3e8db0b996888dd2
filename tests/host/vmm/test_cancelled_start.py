"""A start that is cancelled while a thread makes the process leaves no process."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.host_context import make_context
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.launch_source import source_of
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.vmm import fake
from wrenn_sandbox.host.vmm.base import MachineSpec, Process
from wrenn_sandbox.patience import patience


def _of_this_test(directory: Path) -> list[int]:
    return [
        int(each.name)
        for each in Path("/proc").iterdir()
        if each.name.isdigit()
        and str(directory).encode() in _arguments(each)
        and int(each.name) != os.getpid()
    ]


def _arguments(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


async def test_a_cancelled_start_of_the_fake_driver_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(tmp_path)
    fake.publish_template(context.store)
    source = source_of(context, context.store.resolve("minimal"))
    spawn = fake.FakeDriver._spawn
    spawned: list[Process] = []

    def slow(driver: fake.FakeDriver, spec: MachineSpec) -> Process:
        spawned.append(spawn(driver, spec))
        time.sleep(0.3)
        return spawned[-1]

    monkeypatch.setattr(fake.FakeDriver, "_spawn", slow)
    starting = asyncio.create_task(Machine.boot(context, source, "memory"))
    await asyncio.sleep(0.15)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await asyncio.sleep(0.5)
    assert spawned
    assert _of_this_test(tmp_path) == []


async def test_a_cancelled_start_stops_the_copy_of_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(tmp_path)
    fake.publish_template(context.store)
    source = source_of(context, context.store.resolve("minimal"))
    copying, loop = asyncio.Event(), asyncio.get_running_loop()
    copies: list[str] = []

    def create(
        layer: Path, below: Disk, size: int, check: Callable[[], None], room: object
    ) -> None:
        loop.call_soon_threadsafe(copying.set)
        end = time.monotonic() + patience(20)
        try:
            while time.monotonic() < end:
                check()
                time.sleep(0.01)
        except HostFailure:
            copies.append("given up")
            raise

    monkeypatch.setattr(context.driver.disk_format, "create", create)
    starting = asyncio.create_task(Machine.boot(context, source, "memory"))
    await copying.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert copies == ["given up"]
    assert list(context.paths.run.iterdir()) == []
