"""The Firecracker driver with the real binary and a guest of a few instructions."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from support.tiny_guest import BINARY, COUNTING, ENDING, NEEDS, kernel_of
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.images.manifest import VMSTATE
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.memory.pages import PAGE
from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm.base import MachineSpec, Process, Snapshot
from wrenn_sandbox.host.vmm.firecracker import driver
from wrenn_sandbox.host.vmm.firecracker.driver import FirecrackerDriver
from wrenn_sandbox.ids import new_machine_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import HostSettings
from wrenn_sandbox.testing.data_dir import working_directory

pytestmark = [pytest.mark.root, pytest.mark.serial, *NEEDS]

_SERVES = Path("/dev/userfaultfd").exists()
_MEMORY_MB = 128
_DISK_MB = 4
_ROUNDS = 20


class Host:
    """A driver, a network slot, and machines over the same files."""

    def __init__(self, paths: Paths, namespaces: NamespaceThread, slot: Slot) -> None:
        self.paths = paths
        self.namespaces = namespaces
        self.slot = slot
        self.driver: FirecrackerDriver
        for name, size in (("disk", _DISK_MB << 20), ("runtime", 1 << 20), ("initrd", PAGE)):
            with self.file(name).open("wb") as file:
                file.truncate(size)
            self.file(name).chmod(0o444)

    def file(self, name: str) -> Path:
        return self.paths.images / name

    async def open(self) -> FirecrackerDriver:
        """Another driver, as after a restart of the server."""
        engines = EngineStore(self.paths)
        return await FirecrackerDriver.create(Path(BINARY), self.namespaces, self.paths, engines)

    def spec(self, code: bytes = COUNTING, memory: Path | None = None) -> MachineSpec:
        """A machine to be, in a directory of its own."""
        files = self.paths.machine(new_machine_id())
        files.directory.mkdir(mode=0o711)
        disk = Disk(self.file("disk"), raw=True)
        self.driver.disk_format.create(files.overlay, disk, _DISK_MB << 20)
        os.chown(files.overlay, self.slot.uid, self.slot.uid)
        return MachineSpec(
            files=files,
            slot=self.slot,
            vcpus=1,
            memory_mb=_MEMORY_MB,
            kernel=kernel_of(code, files.directory / "elf"),
            initrd=self.file("initrd"),
            kernel_args="quiet",
            runtime=self.file("runtime"),
            disk_mb=_DISK_MB,
            memory=memory,
            disk_bytes_per_sec=0 if memory is None else 1 << 20,
        )

    async def counts(self, process: Process) -> None:
        """Wait until the guest has counted some rounds more, none of them wrong."""
        async with asyncio.timeout(patience(20)):
            seen = 0
            while seen < _ROUNDS:
                said = await self.driver.diagnosis(process)
                assert "^" not in said
                seen = said.count("~")
                await asyncio.sleep(0.01)

    async def stored(self, process: Process, spec: MachineSpec, name: str) -> Path:
        """The directory that a machine was stored in, which is ended."""
        into = self.paths.data_dir / name
        into.mkdir()
        await self.driver.pause(process, spec, into)
        await self.driver.kill(process)
        return into


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with contextlib.AsyncExitStack() as stack:
        data_dir = stack.enter_context(working_directory(HostSettings().data_dir, "firecracker"))
        paths = Paths(data_dir)
        paths.prepare()
        slots = SlotPool(HostSettings(data_dir=data_dir, slot_pool_size=1))
        await slots.start()
        stack.push_async_callback(slots.close)
        namespaces = NamespaceThread("test-netns")
        stack.callback(namespaces.close)
        host = Host(paths, namespaces, await slots.acquire())
        host.driver = await host.open()
        stack.push_async_callback(lambda: host.driver.close())
        yield host


@pytest.mark.parametrize("served", [True, False])
async def test_a_guest_counts_on_through_two_restores(
    host: Host, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Booted, stored whole, continued over that, stored as what differs, and continued again."""
    served &= _SERVES
    monkeypatch.setattr(driver, "SERVED_BYTES", 0 if served else 1 << 40)
    spec = host.spec()
    image = spec.files.directory / "memory"
    process = await host.driver.boot(spec, record=image)
    await host.counts(process)
    first = await host.stored(process, spec, "first")
    assert {each.name for each in first.iterdir()} == {VMSTATE}
    assert image.stat().st_size == _MEMORY_MB << 20
    assert image.stat().st_blocks * 512 < 4 << 20, "what was never written is a hole"
    memory = host.file("memory")
    image.rename(memory)
    memory.chmod(0o444)

    spec = host.spec(memory=memory)
    process = await host.driver.restore(spec, Snapshot(first / VMSTATE))
    await host.counts(process)
    second = await host.stored(process, spec, "second")
    stored = diff.read_index(second, (_MEMORY_MB << 20) // PAGE)
    assert 64 <= sum(run.count for run in stored) < 80

    spec = host.spec(memory=memory)
    process = await host.driver.restore(spec, Snapshot(second / VMSTATE, second))
    await host.counts(process)
    assert spec.files.page_server.exists() == served
    third = await host.stored(process, spec, "third")
    again = diff.read_index(third, (_MEMORY_MB << 20) // PAGE)
    assert sum(run.count for run in again) < 100

    spec = host.spec(memory=memory)
    process = await host.driver.restore(spec, Snapshot(third / VMSTATE, third))
    await host.counts(process)
    await host.driver.kill(process)


async def _served(host: Host, monkeypatch: pytest.MonkeyPatch) -> tuple[MachineSpec, Process]:
    """A guest whose memory a page server gives it."""
    monkeypatch.setattr(driver, "SERVED_BYTES", 0)
    spec = host.spec()
    image = spec.files.directory / "memory"
    process = await host.driver.boot(spec, record=image)
    await host.counts(process)
    first = await host.stored(process, spec, "first")
    memory = host.file("memory")
    image.rename(memory)
    memory.chmod(0o444)
    spec = host.spec(memory=memory)
    process = await host.driver.restore(spec, Snapshot(first / VMSTATE))
    await host.counts(process)
    second = await host.stored(process, spec, "second")
    spec = host.spec(memory=memory)
    return spec, await host.driver.restore(spec, Snapshot(second / VMSTATE, second))


@pytest.mark.skipif(not _SERVES, reason="there is no /dev/userfaultfd")
async def test_a_vm_ends_with_its_page_server(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, process = await _served(host, monkeypatch)
    await host.counts(process)
    note = msgspec.json.decode(spec.files.page_server.read_bytes())
    os.kill(note["pid"], 9)
    async with asyncio.timeout(patience(5)):
        assert "the page server ended (-9)" in await host.driver.wait(process)
    assert not _exists(process)
    assert await host.driver.stopped(process), "its disk is whole"
    await host.driver.close()
    host.driver = await host.open()
    assert await host.driver.adopt(process, spec), "also for a server that was not there then"
    assert "the page server ended (-9)" in await host.driver.wait(process)
    assert await host.driver.stopped(process)
    await host.driver.kill(process)


@pytest.mark.skipif(not _SERVES, reason="there is no /dev/userfaultfd")
async def test_a_vm_is_adopted_with_its_page_server(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, process = await _served(host, monkeypatch)
    await host.driver.close()
    host.driver = await host.open()
    assert await host.driver.adopt(process, spec)
    await host.counts(process)
    note = msgspec.json.decode(spec.files.page_server.read_bytes())
    third = await host.stored(process, spec, "third")
    assert not _exists(Process(note["pid"], 0))
    spec = host.spec(memory=spec.memory)
    process = await host.driver.restore(spec, Snapshot(third / VMSTATE, third))
    await host.counts(process)
    await host.driver.close()
    note = msgspec.json.decode(spec.files.page_server.read_bytes())
    os.kill(note["pid"], 9)
    await asyncio.sleep(0.1)
    host.driver = await host.open()
    assert await host.driver.adopt(process, spec)
    async with asyncio.timeout(patience(5)):
        assert await host.driver.wait(process) == "the page server ended"
    assert await host.driver.stopped(process)
    await host.driver.kill(process)
    assert not _exists(process)


def _exists(process: Process) -> bool:
    try:
        return bool(Path(f"/proc/{process.pid}/cmdline").read_bytes())
    except OSError:
        return False


async def test_a_guest_that_is_stored_and_runs_on_counts_on(host: Host) -> None:
    spec = host.spec()
    process = await host.driver.boot(spec, record=spec.files.directory / "memory")
    for number in range(2):
        await host.counts(process)
        into = host.paths.data_dir / f"stored-{number}"
        into.mkdir()
        await host.driver.pause(process, spec, into)
        await host.driver.unpause(process, spec)
    await host.counts(process)
    await host.driver.kill(process)


async def test_a_guest_that_ends_its_vm_has_stopped(host: Host) -> None:
    spec = host.spec(ENDING)
    process = await host.driver.boot(spec)
    async with asyncio.timeout(patience(20)):
        assert await host.driver.wait(process) == "the guest stopped"
    assert await host.driver.stopped(process)
    await host.driver.close()
    host.driver = await host.open()
    assert await host.driver.adopt(process, spec), "also for a server that was not there then"
    assert await host.driver.wait(process) == "the guest stopped"
    assert await host.driver.stopped(process)
    await host.driver.kill(process)
    spec.files.vmm_log.write_bytes(b"")
    assert not await host.driver.adopt(process, spec), "nothing says that it ended well"


async def test_a_console_is_bounded_and_read_after_an_adoption(host: Host) -> None:
    spec = host.spec()
    process = await host.driver.boot(spec)
    await host.counts(process)
    await host.driver.close()
    spec.files.console.unlink()
    await asyncio.sleep(0.2)
    host.driver = await host.open()
    assert await host.driver.adopt(process, spec)
    await host.driver.tend(0)
    assert 0 < spec.files.console.stat().st_size <= 64 * 1024
    await host.counts(process)
    await host.driver.kill(process)


async def test_a_captured_firecracker_makes_no_file_beside_its_socket(host: Host) -> None:
    spec = host.spec()
    process = await host.driver.boot(spec)
    status = (spec.files.directory / "api").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o711)
    facts = _facts(process)
    assert "Seccomp:\t2" in facts
    assert f"Uid:\t{spec.slot.uid}\t" in facts
    assert not (spec.files.directory / "kernel").exists()
    await host.driver.kill(process)


async def test_another_process_on_the_socket_is_not_spoken_to(host: Host) -> None:
    spec = host.spec()
    process = await host.driver.boot(spec)
    other = host.spec()
    (other.files.directory / "api").mkdir()
    (other.files.directory / "api" / "socket").symlink_to(spec.files.directory / "api" / "socket")
    own = Process(os.getpid(), _start_time(os.getpid()))
    assert not await host.driver.adopt(own, other)
    await host.driver.kill(process)


def _facts(process: Process) -> str:
    return Path(f"/proc/{process.pid}/status").read_text("ascii")


def _start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19])
