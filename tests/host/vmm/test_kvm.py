"""Which processor guests get under KVM, with programs in the place of QEMU."""

import os
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.probe import KvmVerdict
from wrenn_sandbox.host.vmm.qemu.binary import cpu_model
from wrenn_sandbox.host.vmm.qemu.command import KVM_CPUS
from wrenn_sandbox.host.vmm.qemu.kvm import kvm_cpu, tried

USABLE = KvmVerdict(usable=True, reason="a tiny guest ran")


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    path.chmod(0o666)
    return path


def qemu(tmp_path: Path, *taken: str) -> str:
    """A program that ends well with these processors and refuses all others."""
    program = tmp_path / "qemu"
    cases = "".join(f'*" -cpu {cpu} "*) exit 0 ;;\n' for cpu in taken)
    program.write_text(
        f'#!/bin/sh\ncase "$*" in\n{cases}esac\necho start >&2\necho "bad MSR" >&2\nexit 1\n'
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("first", range(len(KVM_CPUS)))
def test_guests_get_the_first_cpu_with_which_qemu_starts(
    tmp_path: Path, device: Path, first: int
) -> None:
    verdict = tried(USABLE, qemu(tmp_path, *KVM_CPUS[first:]), device)
    assert verdict.usable
    assert verdict.cpu == KVM_CPUS[first]
    assert f"-cpu {KVM_CPUS[first]}" in verdict.reason


def test_kvm_is_of_no_use_where_qemu_starts_with_no_cpu(tmp_path: Path, device: Path) -> None:
    verdict = tried(USABLE, qemu(tmp_path), device)
    assert not verdict.usable
    assert verdict.reason == "a tiny guest ran, but QEMU does not start: bad MSR"
    with pytest.raises(HostFailure):
        kvm_cpu(qemu(tmp_path), device)


def test_qemu_is_not_tried_where_kvm_is_of_no_use(tmp_path: Path) -> None:
    verdict = KvmVerdict(usable=False, reason="there is no /dev/kvm")
    assert tried(verdict, str(tmp_path / "missing")) == verdict


@pytest.mark.root
@pytest.mark.parametrize(
    ("owner", "mode", "usable"), [(0, 0o600, False), (0, 0o660, False), (1, 0o660, True)]
)
def test_a_device_for_root_alone_is_of_no_use_to_vmms(
    tmp_path: Path, device: Path, owner: int, mode: int, usable: bool
) -> None:
    os.chown(device, 0, owner)
    device.chmod(mode)
    verdict = tried(USABLE, qemu(tmp_path, "host"), device)
    assert verdict.usable == usable
    assert ("root alone" in verdict.reason) != usable


def test_a_missing_qemu_is_a_refusal(tmp_path: Path, device: Path) -> None:
    assert not tried(USABLE, str(tmp_path / "missing"), device).usable


def test_stored_sandboxes_tell_each_cpu_option_from_the_others() -> None:
    models = {cpu_model(option) for option in KVM_CPUS}
    assert len(models) == len(KVM_CPUS)
    assert cpu_model("host,-arch-capabilities") == f"{cpu_model('host')},-arch-capabilities"
    assert cpu_model("Nehalem") == f"Nehalem on {cpu_model('host')}"
    assert cpu_model("max") == "max"
