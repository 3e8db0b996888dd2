"""What the Firecracker driver does around its processes, with others in their place."""

import asyncio
import contextlib
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from support.machine_specs import machine_spec
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.memory.page_server import PageServer
from wrenn_sandbox.host.memory.pages import PAGE, Run
from wrenn_sandbox.host.paths import MachineFiles, Paths
from wrenn_sandbox.host.privileged.confinement import Confinement
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle, process_start_time
from wrenn_sandbox.host.vmm.base import MachineSpec, Process, Snapshot
from wrenn_sandbox.host.vmm.files import LOG_LIMIT
from wrenn_sandbox.host.vmm.firecracker import driver as firecracker
from wrenn_sandbox.host.vmm.firecracker.api import Api
from wrenn_sandbox.host.vmm.firecracker.binary import Firecracker
from wrenn_sandbox.host.vmm.firecracker.driver import FirecrackerDriver
from wrenn_sandbox.host.vmm.firecracker.process import Running, read_end
from wrenn_sandbox.patience import patience


def _sleeping() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["sleep", "100"])


class StartingDriver(FirecrackerDriver):
    """Its processes sleep, and load nothing unless they are told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            Firecracker("1.14.4", "", directory),
            EngineStore(Paths(directory)),
            cast(NamespaceThread, None),
            Confinement(),
        )
        self.child = _sleeping()
        self.fails = False
        self.loads = False
        self.pages: PageServer | None = None
        self.diagnosing = asyncio.Event()

    async def _spawn(
        self,
        firecracker: Firecracker,
        spec: MachineSpec,
        readable: Sequence[Path],
        fds: Sequence[int] = (),
    ) -> Running:
        api = Api(spec.files.directory / "socket", self.child.pid)
        return Running(ProcessHandle.of_child(self.child), api, spec.files)

    async def _load(
        self,
        running: Running,
        spec: MachineSpec,
        snapshot: Snapshot,
        served: bool,
        checked: "asyncio.Task[None]",
    ) -> None:
        if self.loads:
            await super()._load(running, spec, snapshot, served, checked)
        await checked
        if self.fails:
            raise HostFailure("The machine did not start")

    async def diagnosis(self, process: Process) -> str:
        self.diagnosing.set()
        await asyncio.sleep(0.1)
        return ""

    async def _page_server(self, spec: MachineSpec) -> PageServer:
        self.pages = SleepingPageServer(ProcessHandle.of_child(_sleeping()), spec.files)
        return self.pages

    @property
    def leaves_a_process(self) -> bool:
        return self.child.poll() is None or bool(self._running)


class SleepingPageServer(PageServer):
    """It serves nothing."""

    def serve(self, machine: ProcessHandle) -> None:
        return


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"state")
    return path


@pytest.fixture
async def driver(tmp_path: Path) -> AsyncIterator[StartingDriver]:
    driver = StartingDriver(tmp_path)
    yield driver
    driver.child.kill()
    driver.child.wait()


def _spec(file: Path) -> MachineSpec:
    directory = file.parent / "machine"
    directory.mkdir()
    return replace(machine_spec(directory, file), memory=file)


async def test_a_start_that_is_cancelled_at_its_very_end_leaves_no_firecracker(
    driver: StartingDriver, file: Path
) -> None:
    """The host is busy then: no thread is free to remove the file that was loaded."""
    busy, free = asyncio.Event(), threading.Event()
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    loop.set_default_executor(threads)

    def check() -> None:
        threads.submit(free.wait)
        loop.call_soon_threadsafe(busy.set)

    starting = asyncio.create_task(driver.restore(_spec(file), Snapshot(file, None, check)))
    async with asyncio.timeout(patience(20)):
        await busy.wait()
    await asyncio.sleep(0.1)
    assert driver._running
    starting.cancel()
    await asyncio.sleep(0)
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not driver.leaves_a_process


async def test_a_failed_start_that_is_cancelled_leaves_no_firecracker(
    driver: StartingDriver, file: Path
) -> None:
    driver.fails = True
    starting = asyncio.create_task(driver.restore(_spec(file), Snapshot(file)))
    async with asyncio.timeout(patience(20)):
        await driver.diagnosing.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not driver.leaves_a_process


async def test_a_firecracker_that_ends_during_the_check_is_a_failure_of_the_host(
    driver: StartingDriver, file: Path
) -> None:
    checking, held = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    driver.loads = True

    def check() -> None:
        loop.call_soon_threadsafe(checking.set)
        held.wait(patience(20))

    starting = asyncio.create_task(driver.restore(_spec(file), Snapshot(file, None, check)))
    async with asyncio.timeout(patience(20)):
        await checking.wait()
        os.kill(driver.child.pid, 9)
        await driver.diagnosing.wait()
    held.set()
    with pytest.raises(HostFailure, match="ended unexpectedly"):
        await starting


async def test_a_page_server_that_ends_during_the_start_is_named(
    driver: StartingDriver, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firecracker, "SERVED_BYTES", 0)
    checking, held = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    driver.loads = driver._serves = True
    (tmp_path / diff.INDEX).write_bytes(diff.encode_index([Run(0, 1)], (128 << 20) // PAGE))
    (tmp_path / diff.PAGES).write_bytes(bytes(PAGE))

    def check() -> None:
        loop.call_soon_threadsafe(checking.set)
        held.wait(patience(20))

    starting = asyncio.create_task(driver.restore(_spec(file), Snapshot(file, tmp_path, check)))
    async with asyncio.timeout(patience(20)):
        await checking.wait()
        while driver.pages is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        os.kill(driver.pages.pid, 9)
        await driver.diagnosing.wait()
    held.set()
    with pytest.raises(HostFailure, match="page server of the machine ended") as failure:
        await starting
    assert "the page server ended (-9)" in str(failure.value.detail)
    assert not driver.leaves_a_process


def test_a_console_is_read_without_waiting_whatever_the_vmm_makes_of_its_end() -> None:
    theirs, output = os.pipe2(os.O_NONBLOCK)
    console = read_end(f"/proc/self/fd/{theirs}")
    os.set_blocking(theirs, True)
    assert not os.get_blocking(console)
    os.write(output, b"~")
    os.close(theirs)
    assert os.read(console, 10) == b"~"
    with contextlib.suppress(BlockingIOError):
        assert not os.read(console, 10)
    for each in (console, output):
        os.close(each)


def test_a_vmm_that_puts_something_else_in_the_place_of_its_console_is_not_read(
    tmp_path: Path,
) -> None:
    assert read_end(str(tmp_path)) == -1
    assert read_end("/dev/zero") == -1
    assert read_end(str(tmp_path / "missing")) == -1


def _running(driver: StartingDriver, directory: Path, console: int = -1) -> Running:
    """A machine that the driver knows, whose process is that of all others."""
    pid = driver.child.pid
    handle = ProcessHandle.adopt(pid, process_start_time(pid))
    running = Running(handle, Api(directory, pid), MachineFiles(directory), console)
    driver._running[Process(len(driver._running), 0)] = running
    return running


async def test_a_machine_whose_files_cannot_be_tended_keeps_no_other_from_it(
    driver: StartingDriver, file: Path, tmp_path: Path
) -> None:
    consoles = [os.pipe2(os.O_NONBLOCK) for _ in range(2)]
    for _, output in consoles:
        os.write(output, b"said")
        os.close(output)
    _running(driver, file, consoles[0][0])
    other = _running(driver, tmp_path, consoles[1][0])
    other.files.vmm_log.write_bytes(bytes(LOG_LIMIT + 1))
    await driver.tend(0)
    assert other.files.vmm_log.stat().st_size == 0
    assert other.files.console.read_bytes() == b"said"
    await driver.close()


async def test_how_a_firecracker_ended_that_an_earlier_server_started_stays_known(
    driver: StartingDriver, file: Path, tmp_path: Path
) -> None:
    spec, gone = _spec(file), Process(driver.child.pid, 1)
    ended = b"Firecracker exiting successfully. exit_code=0\n"
    spec.files.vmm_log.write_bytes(bytes(LOG_LIMIT) + ended)
    assert await driver.adopt(gone, spec)
    await driver.tend(0)
    assert spec.files.vmm_log.stat().st_size > LOG_LIMIT
    spec.files.vmm_log.write_bytes(b"")
    assert await driver.stopped(gone)


async def test_a_vm_that_the_server_had_to_end_is_known_to_the_next_server(
    driver: StartingDriver, file: Path
) -> None:
    spec, gone = _spec(file), Process(driver.child.pid, 1)
    assert not await driver.adopt(gone, spec)
    spec.files.lost.write_text("the page server ended")
    assert await driver.adopt(gone, spec)
    assert await driver.wait(gone) == "the page server ended"
    assert await driver.stopped(gone)


async def test_a_vm_that_the_server_was_about_to_end_is_ended_by_the_next_one(
    driver: StartingDriver, file: Path
) -> None:
    spec, pid = _spec(file), driver.child.pid
    spec.files.lost.write_text("the page server ended")
    process = Process(pid, process_start_time(pid))
    assert await driver.adopt(process, spec)
    assert driver.child.poll() is not None
    assert await driver.stopped(process)
    await driver.close()
