"""A start that fails keeps why it did: the log tells a VMM that ended from one that is slow."""

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

import pytest

from support.host_context import make_context
from support.machine_specs import machine_spec
from wrenn_sandbox import patience as patience_module
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.disk.qcow2 import overlay
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.launch_source import source_of
from wrenn_sandbox.host.machine import Machine
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.confinement import Confinement
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm import fake
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.host.vmm.qemu import driver as driver_module
from wrenn_sandbox.host.vmm.qemu import monitor as monitor_module
from wrenn_sandbox.host.vmm.qemu.command import Program, Variant
from wrenn_sandbox.host.vmm.qemu.driver import Qemu, QemuDriver
from wrenn_sandbox.host.vmm.qemu.monitor import Monitor, listen
from wrenn_sandbox.wire.guest import AGENT_PORT

LIMIT_SEC = 0.2


@pytest.fixture
def spec(tmp_path: Path) -> MachineSpec:
    base, directory = tmp_path / "base", tmp_path / "machine"
    directory.mkdir()
    base.write_bytes(bytes(1 << 20))
    spec = machine_spec(directory, base)
    overlay.create(spec.files.overlay, below=Disk(base, raw=True), size=1 << 20)
    return spec


@pytest.fixture
async def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[QemuDriver]:
    monkeypatch.setattr(monitor_module, "_CONNECT_SEC", LIMIT_SEC)
    qemu = Qemu(Variant(Program(("qemu",)), "tcg", None, None), (7, 2, 0))
    engines = EngineStore(Paths(tmp_path))
    driver = QemuDriver(qemu, engines, cast(NamespaceThread, None), Confinement())
    yield driver
    await driver.close()


def _runs(monkeypatch: pytest.MonkeyPatch, script: str, *, listens: bool = True) -> None:
    """Have the driver start a shell script in the place of QEMU."""

    async def launch(
        *_: object, output: IO[bytes], pass_fds: Collection[int], **__: object
    ) -> ProcessHandle:
        return await asyncio.to_thread(_child, script, output, pass_fds if listens else ())

    monkeypatch.setattr(driver_module, "launch", launch)


def _child(script: str, output: IO[bytes], pass_fds: Collection[int]) -> ProcessHandle:
    child = subprocess.Popen(["sh", "-c", script], stdout=output, stderr=output, pass_fds=pass_fds)
    return ProcessHandle.of_child(child)


async def _failure(driver: QemuDriver, spec: MachineSpec) -> HostFailure:
    with pytest.raises(HostFailure) as caught:
        await driver.boot(spec)
    return caught.value


async def test_a_vmm_that_ends_at_its_start_is_said_to_have_ended(
    driver: QemuDriver, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _runs(monkeypatch, "echo no such option; exit 3")
    error = await _failure(driver, spec)
    assert error.detail == "QEMU ended with status 3\nvmm.log: no such option"


async def test_a_vmm_that_is_slow_is_said_to_be_slow(
    driver: QemuDriver, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _runs(monkeypatch, "exec sleep 60")
    error = await _failure(driver, spec)
    assert error.detail == "QMP: no greeting within 0.2 s"


async def test_a_vmm_whose_connection_ends_before_it_is_said_to_have_ended(
    driver: QemuDriver, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _runs(monkeypatch, "sleep 0.05; kill -SYS $$", listens=False)
    error = await _failure(driver, spec)
    assert error.detail == f"QEMU ended with status {-signal.SIGSYS}"


async def test_a_slow_host_waits_longer_for_a_vmm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "_CONNECT_SEC", LIMIT_SEC)
    monkeypatch.setattr(patience_module, "slowness", lambda: 100)
    with listen(tmp_path / "s") as listener:
        thread = threading.Thread(target=_greet_late, args=(listener,))
        thread.start()
        monitor = await Monitor.connect(tmp_path / "s")
        await monitor.close()
        thread.join()


def _greet_late(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        time.sleep(2 * LIMIT_SEC)
        connection.sendall(b'{"QMP": {"version": {"qemu": {"major": 7}}}}\n')
        connection.recv(4096)
        connection.sendall(b'{"return": {}, "id": 1}\n')


async def _initialized(
    data_dir: Path, connect: Callable[[], None], boot_timeout_sec: float
) -> HostFailure:
    """How the start of a guest fails to which nobody can connect."""

    async def refused(slot: Slot, guest_port: int = AGENT_PORT) -> socket.socket:
        connect()
        raise ConnectionRefusedError

    context = make_context(data_dir)
    settings = context.settings.model_copy(update={"boot_timeout_sec": boot_timeout_sec})
    context = replace(context, connect=refused, settings=settings)
    fake.publish_template(context.store)
    source = source_of(context, context.store.resolve("minimal"))
    machine = await Machine.boot(context, source, "memory")
    try:
        with pytest.raises(HostFailure) as caught:
            async with asyncio.timeout(60):
                await machine.initialize_guest("guest")
        return caught.value
    finally:
        await machine.release()


async def test_a_vm_that_ends_while_it_starts_is_said_to_have_ended(tmp_path: Path) -> None:
    def end() -> None:
        for each in Path("/proc").iterdir():
            if each.name.isdigit() and int(each.name) != os.getpid() and _is_of(each, tmp_path):
                os.kill(int(each.name), signal.SIGKILL)

    error = await _initialized(tmp_path, end, boot_timeout_sec=60)
    assert error.message == "The sandbox ended while it started"
    assert error.detail == "the agent ended (-9)"


async def test_a_guest_that_is_slow_is_said_to_be_slow(tmp_path: Path) -> None:
    error = await _initialized(tmp_path, lambda: None, boot_timeout_sec=0.2)
    assert error.message == "The sandbox did not answer in time"
    assert error.detail is not None
    assert error.detail.startswith("no answer of the guest agent within ")


def _is_of(process: Path, directory: Path) -> bool:
    try:
        return str(directory).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False
