"""The drivers that a host can have, and which one it takes."""

import os
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from support.machine_specs import SLOT
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host import backends, journal
from wrenn_sandbox.host.backends import BACKENDS, Backends
from wrenn_sandbox.host.journal import Record
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.process import process_start_time
from wrenn_sandbox.host.probe import KvmVerdict
from wrenn_sandbox.host.vmm.base import Process
from wrenn_sandbox.ids import new_image_id, new_machine_id, new_sandbox_id
from wrenn_sandbox.settings import HostSettings
from wrenn_sandbox.wire.messages import Phase


def test_the_setting_takes_the_name_of_each_driver() -> None:
    assert set(get_args(HostSettings.model_fields["driver"].annotation)) == {"auto", *BACKENDS}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostSettings:
    """Of a host with KVM, taps and a Firecracker."""

    async def works(_: Path) -> KvmVerdict:
        return KvmVerdict(usable=True, reason="")

    monkeypatch.setattr(backends, "kvm_verdict", works)
    monkeypatch.setattr(backends, "choose_network", lambda _: "tap")
    monkeypatch.setattr(backends, "require_usable", lambda _: "1.14.4")
    binary = tmp_path / "firecracker"
    binary.touch()
    return HostSettings(data_dir=tmp_path, driver="auto", accelerator="auto", firecracker=binary)


async def _choice(settings: HostSettings, **changes: object) -> str:
    changed = settings.model_copy(update=changes)
    return await backends._chosen(changed, Paths(changed.data_dir))


async def test_a_host_takes_firecracker_where_it_is_and_runs(settings: HostSettings) -> None:
    assert await _choice(settings) == "firecracker"
    assert await _choice(settings, cpu_model="host") == "firecracker"
    assert await _choice(settings, driver="qemu") == "qemu"
    assert await _choice(settings, firecracker=settings.data_dir / "missing") == "qemu"


@pytest.mark.parametrize("changes", [{"accelerator": "tcg"}, {"cpu_model": "EPYC-v1"}])
async def test_a_host_takes_qemu_where_only_that_does_what_is_asked(
    settings: HostSettings, changes: dict[str, object]
) -> None:
    assert await _choice(settings, **changes) == "qemu"


async def test_a_firecracker_that_cannot_be_used_is_no_choice(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> str:
        raise HostFailure("Firecracker 1.2.3 is too old; 1.13 or later is needed")

    monkeypatch.setattr(backends, "require_usable", refuse)
    assert await _choice(settings) == "qemu"
    monkeypatch.setattr(backends, "choose_network", lambda _: "user")
    assert await _choice(settings) == "qemu"


def _run(paths: Paths, driver: str, **changes: object) -> None:
    """A sandbox whose VM is this process."""
    pid = os.getpid()
    record = Record(
        machine_id=new_machine_id(),
        image_id=new_image_id(),
        vcpus=1,
        memory_mb=128,
        driver=driver,
        boot_id=journal.boot_id(),
        slot=SLOT,
        phase=Phase.RUNNING,
        sandbox_id=new_sandbox_id(),
        process=Process(pid, process_start_time(pid)),
    )
    record = msgspec.structs.replace(record, **changes)
    files = paths.machine(record.machine_id)
    files.directory.mkdir(parents=True)
    journal.write(files.journal, record)


@pytest.mark.parametrize(("used", "other"), [("qemu", "firecracker"), ("firecracker", "qemu")])
async def test_a_change_of_driver_ends_no_sandbox_that_runs(
    settings: HostSettings, used: str, other: str
) -> None:
    _run(Paths(settings.data_dir), used)
    with pytest.raises(HostFailure, match=f"Start with WRENN_DRIVER={used}, and pause or delete"):
        await _choice(settings, driver=other)
    assert await _choice(settings, driver=used) == used
    assert await _choice(settings) == used


async def test_a_host_without_the_driver_of_its_sandboxes_does_not_start(
    settings: HostSettings,
) -> None:
    _run(Paths(settings.data_dir), "firecracker")
    with pytest.raises(HostFailure, match="WRENN_DRIVER=firecracker"):
        await _choice(settings, firecracker=settings.data_dir / "missing")


@pytest.mark.parametrize(
    "changes",
    [
        {"boot_id": "before"},
        {"sandbox_id": None},
        {"phase": Phase.STARTING},
        {"process": None},
        {"process": Process(os.getpid(), 1)},
    ],
)
async def test_a_vm_that_nobody_would_adopt_binds_no_driver(
    settings: HostSettings, changes: dict[str, object]
) -> None:
    _run(Paths(settings.data_dir), "qemu", **changes)
    assert await _choice(settings) == "firecracker"


async def test_firecracker_says_what_it_lacks(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings.model_copy(update={"driver": "firecracker"})
    with pytest.raises(HostFailure, match="WRENN_ACCELERATOR is tcg"):
        await Backends.of(asked.model_copy(update={"accelerator": "tcg"}), Paths(asked.data_dir))

    async def broken(_: Path) -> KvmVerdict:
        return KvmVerdict(usable=False, reason="there is no /dev/kvm")

    monkeypatch.setattr(backends, "kvm_verdict", broken)
    paths = Paths(asked.data_dir)
    paths.prepare()
    with pytest.raises(HostFailure, match="KVM is not usable: there is no /dev/kvm"):
        await Backends.of(asked, paths)
