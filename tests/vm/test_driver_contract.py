"""What every driver does, whatever it drives."""

import asyncio
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3

from support.tiny_guest import NEEDS
from support.vm.played import PLAYED
from support.vm.stand import Stand, answered, standing
from wrenn_sandbox.errors import HostFailure, IncompatibleImage
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.backends import BACKENDS, Backends
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.guest import GuestClient, RunningGuest
from wrenn_sandbox.host.images.manifest import VMSTATE, FileDigest
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.memory.pages import PAGE, Run
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.process import own_memory
from wrenn_sandbox.host.vmm.base import Driver, MachineSpec, Process, Snapshot
from wrenn_sandbox.ids import new_machine_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command

_END_SEC = 60.0


async def _waiting(driver: Driver, process: Process) -> "asyncio.Task[str]":
    """A task that waits for the machine's end, and has begun to."""
    task = asyncio.create_task(driver.wait(process))
    await asyncio.sleep(0)
    return task


def _exists(process: Process) -> bool:
    try:
        return bool(Path(f"/proc/{process.pid}/cmdline").read_bytes())
    except OSError:
        return False


_REAL = [
    pytest.param("qemu", marks=pytest.mark.vm),
    pytest.param("firecracker", marks=(pytest.mark.vm, *NEEDS)),
]
_DRIVERS = ["fake", "firecracker-played", *_REAL]


@pytest.fixture(params=_DRIVERS)
async def stand(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Stand]:
    """Drivers without VMs bring a template of their own, so they need none that was built."""
    images: Path
    driver, _, played = request.param.partition("-")
    if played:
        monkeypatch.setitem(BACKENDS, driver, PLAYED)
    if played:  # in a place that users of machines can reach
        images = Settings().data_dir
    elif driver == "fake":
        images = tmp_path_factory.mktemp("images")
    else:
        images = request.getfixturevalue("images")
    async with standing(images, driver) as stand:
        yield stand


async def test_a_machine_from_its_start_to_its_end(stand: Stand) -> None:
    capabilities = stand.driver.capabilities
    assert capabilities.version
    assert capabilities.name == stand.settings.driver
    async with stand.machine() as (spec, process, client):
        result = await RunningGuest(client).exec(
            Command(cmd="echo", args=("hello",)), timeout=patience(30), output_limit=1024
        )
        assert result.stdout == b"hello\n"
        assert own_memory(process.pid) > 0
        ended = await _waiting(stand.driver, process)
        await stand.driver.kill(process)
        assert await asyncio.wait_for(ended, patience(5))
        assert not _exists(process)
        await stand.driver.kill(process)
        with pytest.raises(OSError):
            await connect_guest(stand.equipment.namespaces, spec.slot)


async def test_a_machine_that_dies_by_itself(stand: Stand) -> None:
    async with stand.machine() as (_, process, _client):
        os.kill(process.pid, 9)
        assert "9" in await asyncio.wait_for(stand.driver.wait(process), patience(5))
        assert isinstance(await stand.driver.diagnosis(process), str)
        assert not await stand.driver.stopped(process)


async def test_another_driver_object_adopts_it(stand: Stand) -> None:
    async with stand.machine() as (spec, process, client):
        await stand.equipment.close()
        assert _exists(process)
        other = await Backends.of(stand.settings, stand.paths)
        try:
            impostor = Process(process.pid, process.start_time + 1)
            assert not await other.driver.adopt(impostor, spec)
            assert await other.driver.adopt(process, spec)
            await client.health()
            ended = await _waiting(other.driver, process)
            await other.driver.kill(process)
            assert await asyncio.wait_for(ended, patience(5))
            assert not await other.driver.adopt(process, spec)
        finally:
            await other.close()
        assert not _exists(process)


@pytest.mark.parametrize("stand", _REAL, indirect=True)
async def test_a_machine_that_cannot_start_says_why(stand: Stand) -> None:
    async with stand.spec() as spec:
        broken = dataclasses.replace(spec, kernel=spec.files.directory / "missing")
        with pytest.raises(HostFailure) as caught:
            await stand.driver.boot(broken)
        assert "missing" not in str(caught.value)
        assert "missing" in (caught.value.detail or "")


@pytest.mark.parametrize("stand", _REAL, indirect=True)
async def test_the_console_of_a_guest_that_panics_is_kept(stand: Stand) -> None:
    async with stand.spec() as spec:
        garbage = spec.files.directory / "garbage"
        garbage.write_bytes(bytes(4096))
        os.chown(garbage, spec.slot.uid, spec.slot.uid)
        process = await stand.driver.boot(dataclasses.replace(spec, initrd=garbage))
        try:
            reason = await asyncio.wait_for(stand.driver.wait(process), patience(_END_SEC))
            assert reason
            assert "panic" in (await stand.driver.diagnosis(process)).lower()
        finally:
            await stand.driver.kill(process)


_PATTERN = "0123456789abcdef"


async def _run(client: GuestClient, script: str) -> str:
    result = await RunningGuest(client).exec(
        Command(cmd="sh", args=("-c", script)), timeout=patience(60), output_limit=1 << 16
    )
    assert result.exit_code == 0, result
    return result.stdout.decode()


async def _written(client: GuestClient) -> str:
    """Fill 4 MiB with a pattern, which the guest has yet to write to its disk; the digest."""
    return await _run(
        client,
        f"yes {_PATTERN} | head -c 4194304 > pattern; sha256sum < pattern",
    )


async def _digest(client: GuestClient) -> str:
    return await _run(client, "sha256sum < pattern")


def _next(spec: MachineSpec, image: Path, disk: Path, files: MachineFiles) -> MachineSpec:
    """The machine that continues another, over its memory and disk."""
    return dataclasses.replace(spec, files=files, memory=image, disks=(*spec.disks, disk))


async def test_what_was_in_memory_and_on_disk_is_there_after_each_restore(stand: Stand) -> None:
    """Boot, pause, run on; restore what was stored, change it, pause and restore again."""
    driver = stand.driver
    async with stand.spec() as spec:
        stored = [stand.paths.data_dir / f"stored-{number}" for number in range(2)]
        for directory in stored:
            directory.mkdir()
        image = spec.files.directory / "memory"
        process = await driver.boot(spec, record=image)
        client = stand.client(spec)
        try:
            await answered(client)
            before = await _written(client)
            client.close()
            files = await driver.pause(process, spec, stored[0])
            assert VMSTATE in files
            for name, digest in files.items():
                data = (stored[0] / name).read_bytes()
                assert digest == FileDigest(len(data), blake3=blake3(data).hexdigest())
            kept, disk = stand.paths.data_dir / "memory", stand.paths.data_dir / "disk-0"
            copy_sparse(image, kept)
            os.link(spec.files.overlay, disk)
            await driver.unpause(process, spec)
            client = stand.client(spec)
            assert await _digest(client) == before, "it runs on"
        finally:
            client.close()
            await driver.kill(process)
        copy_sparse(disk, copy := disk.with_name("disk"))
        for path in (kept, copy, *stored[0].iterdir()):
            path.chmod(0o644)

        second = await _continued(stand, spec, kept, copy)
        process = await driver.restore(second, Snapshot(stored[0] / VMSTATE))
        client = stand.client(second)
        try:
            await answered(client)
            assert await _digest(client) == before
            await _run(client, "printf changed >> pattern")
            changed = await _digest(client)
            assert changed != before
            client.close()
            files = await driver.pause(process, second, stored[1])
            assert files.keys() == {VMSTATE, diff.INDEX, diff.PAGES}
            layer = stand.paths.data_dir / "layer"
            copy_sparse(second.files.overlay, layer)
            layer.chmod(0o644)
        finally:
            client.close()
            await driver.kill(process)

        third = await _continued(stand, second, kept, layer)
        process = await driver.restore(third, Snapshot(stored[1] / VMSTATE, stored[1]))
        client = stand.client(third)
        try:
            await answered(client)
            assert await _digest(client) == changed
        finally:
            client.close()
            await driver.kill(process)


def copy_sparse(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


async def _continued(stand: Stand, spec: MachineSpec, image: Path, disk: Path) -> MachineSpec:
    """A machine with a directory of its own, whose empty layer is over `disk`."""
    files = stand.paths.machine(new_machine_id())
    files.directory.mkdir(mode=0o711)
    size = spec.disk_mb << 20
    stand.driver.disk_format.create(files.overlay, Disk(disk, raw=False), size)
    stand.driver.disk_format.require(files.overlay, [Disk(disk, raw=False)], size)
    for path in (files.directory, files.overlay):
        os.chown(path, spec.slot.uid, spec.slot.uid)
    return _next(spec, image, disk, files)


async def test_a_vm_that_was_stopped_is_adopted_and_runs_on(stand: Stand) -> None:
    """As after a server that died in the middle of a pause."""
    async with stand.machine() as (spec, process, client):
        stored = stand.paths.data_dir / "stored"
        stored.mkdir()
        await stand.driver.pause(process, spec, stored)
        client.close()
        await stand.equipment.close()
        other = await Backends.of(stand.settings, stand.paths)
        try:
            assert await other.driver.adopt(process, spec)
            again = GuestClient(lambda: connect_guest(other.namespaces, spec.slot), None)
            await answered(again)
            again.close()
            await other.driver.tend(0)
            await other.driver.kill(process)
        finally:
            await other.close()


async def test_a_snapshot_that_is_missing_leaves_nothing_running(stand: Stand) -> None:
    async with stand.spec() as spec:
        image = spec.files.directory / "memory"
        image.touch()
        os.truncate(image, spec.memory_mb << 20)
        missing = Snapshot(spec.files.directory / "missing")
        with pytest.raises((HostFailure, OSError)):
            await stand.driver.restore(dataclasses.replace(spec, memory=image), missing)
        assert journal.processes_of(spec.files.directory) == []


async def test_a_snapshot_that_has_changed_is_not_continued(stand: Stand) -> None:
    """That is found out while the VMM starts, or before."""

    def changed() -> None:
        raise IncompatibleImage("it has changed")

    async with stand.spec() as spec:
        image, state = spec.files.directory / "memory", spec.files.directory / "state"
        for path in (image, state):
            path.touch()
        os.truncate(image, spec.memory_mb << 20)
        image.chmod(0o644)
        with pytest.raises(IncompatibleImage, match="it has changed"):
            await stand.driver.restore(
                dataclasses.replace(spec, memory=image), Snapshot(state, check=changed)
            )
        assert journal.processes_of(spec.files.directory) == []


@pytest.mark.parametrize("name", [VMSTATE, diff.INDEX, diff.PAGES])
@pytest.mark.parametrize("damage", ["missing", "empty"])
async def test_a_stored_file_that_is_damaged_is_named(stand: Stand, name: str, damage: str) -> None:
    """By the check, though the driver fails of it first."""

    def check() -> None:
        time.sleep(0.2)
        raise IncompatibleImage(f"{name} is {damage}")

    async with stand.spec() as spec:
        image, stored = spec.files.directory / "memory-image", spec.files.directory / "stored"
        with image.open("wb") as file:
            file.truncate(spec.memory_mb << 20)
        image.chmod(0o644)
        stored.mkdir()
        (stored / VMSTATE).write_bytes(b"state")
        index = diff.encode_index([Run(0, 1)], (spec.memory_mb << 20) // PAGE)
        (stored / diff.INDEX).write_bytes(index)
        (stored / diff.PAGES).write_bytes(bytes(PAGE))
        (stored / name).unlink()
        if damage == "empty":
            (stored / name).touch()
        snapshot = Snapshot(stored / VMSTATE, stored, check)
        with pytest.raises(IncompatibleImage, match=f"{name} is {damage}"):
            await stand.driver.restore(dataclasses.replace(spec, memory=image), snapshot)
        assert journal.processes_of(spec.files.directory) == []


async def test_a_start_that_is_cancelled_leaves_nothing_running(stand: Stand) -> None:
    """As of a sandbox that is deleted while it is resumed."""
    checking, held = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(checking.set)
        held.wait(patience(20))

    async with stand.spec() as spec:
        image, state = spec.files.directory / "memory", spec.files.directory / "state"
        for path in (image, state):
            path.touch()
        os.truncate(image, spec.memory_mb << 20)
        image.chmod(0o644)
        start = stand.driver.restore(
            dataclasses.replace(spec, memory=image), Snapshot(state, check=wait)
        )
        task = asyncio.create_task(start)
        await checking.wait()
        if stand.driver.capabilities.own_kernel:  # else it checks before it starts anything
            while not journal.processes_of(spec.files.directory):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        held.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert journal.processes_of(spec.files.directory) == []
