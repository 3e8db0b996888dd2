"""What a new server ends of the machines that it does not make its own."""

import contextlib
import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.generations import commit
from support.host_context import make_context
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.privileged.process import process_start_time
from wrenn_sandbox.host.recovery import Recovery
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm.base import Process
from wrenn_sandbox.ids import ImageId, SandboxId, new_machine_id

_HIDDEN = """
import ctypes, threading
threading.Thread(target=threading.Event().wait).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
"""The main thread ends and the process goes on: it has no command line and no namespaces then."""


@pytest.fixture
def context(tmp_path: Path) -> HostContext:
    return make_context(tmp_path)


@pytest.fixture
def hidden() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", _HIDDEN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while Path(f"/proc/{process.pid}/cmdline").read_bytes():
            continue
        yield process
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def noted(context: HostContext, pid: int, boot_id: str) -> Path:
    """The directory of a machine that nobody can adopt, with the process of its journal."""
    machine_id = new_machine_id(context.random)
    files = context.paths.machine(machine_id)
    files.directory.mkdir()
    record = Record(
        machine_id=machine_id,
        image_id=ImageId("img-" + "b" * 20),
        vcpus=1,
        memory_mb=128,
        driver="fake",
        boot_id=boot_id,
        slot=Slot(index=1, netns=None, host_ip="127.0.0.1", uid=720_001, tap=None, host_port=1),
        process=Process(pid, process_start_time(pid)),
    )
    journal.write(files.journal, record)
    return files.directory


async def taken_over(context: HostContext) -> dict[SandboxId, Sandbox]:
    def none(_: SandboxId) -> Sandbox:
        raise AssertionError("there is nothing to adopt")

    return await Recovery(context, none).run()


async def test_a_monitor_that_hides_is_ended(
    context: HostContext, hidden: "subprocess.Popen[bytes]"
) -> None:
    directory = noted(context, hidden.pid, journal.boot_id())
    assert journal.processes_of(directory) == []
    assert await taken_over(context) == {}
    assert not directory.exists()
    assert hidden.wait(5) == -9


async def test_a_stored_sandbox_that_the_disk_does_not_give_back_stops_no_start(
    context: HostContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the manifest of one fails, as with a bad sector, or its directory; it is kept."""
    one, other = (SandboxId("sb-" + letter * 20) for letter in "cd")
    manifest = context.paths.generation(one, 1) / "manifest.json"
    manifest.mkdir(parents=True)
    context.paths.stored(other).mkdir()
    iterdir = Path.iterdir

    def broken(path: Path) -> Iterator[Path]:
        if path == context.paths.stored(other):
            raise OSError(errno.EIO, "Input/output error")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", broken)
    found = await Recovery(context, lambda each: Sandbox(context, each, never)).run()
    assert found[one].is_damaged
    assert found[other].is_damaged
    assert manifest.exists()


async def test_a_paused_sandbox_that_cannot_be_tidied_stays(context: HostContext) -> None:
    manifest = commit(context.paths, 1)
    disk = context.paths.generation(manifest.sandbox_id, 1) / "disk"
    disk.unlink()
    disk.symlink_to(disk)  # whatever is done to it fails
    found = await Recovery(context, lambda each: Sandbox(context, each, never)).run()
    assert found[manifest.sandbox_id].stored == manifest


def never(_: Sandbox, reason: str) -> None:
    raise AssertionError(reason)


async def test_a_process_of_a_time_before_the_last_boot_is_another(
    context: HostContext, hidden: "subprocess.Popen[bytes]"
) -> None:
    directory = noted(context, hidden.pid, "another boot")
    assert await taken_over(context) == {}
    assert not directory.exists()
    assert hidden.poll() is None
