"""Which processor guests get under KVM, with programs in the place of QEMU."""

from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.probe import KvmVerdict
from wrenn_sandbox.host.vmm.qemu.binary import cpu_model
from wrenn_sandbox.host.vmm.qemu.command import KVM_CPUS
from wrenn_sandbox.host.vmm.qemu.kvm import kvm_cpu, tried

USABLE = KvmVerdict(usable=True, reason="a tiny guest ran")


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
def test_guests_get_the_first_cpu_with_which_qemu_starts(tmp_path: Path, first: int) -> None:
    verdict = tried(USABLE, qemu(tmp_path, *KVM_CPUS[first:]))
    assert verdict.usable
    assert verdict.cpu == KVM_CPUS[first]
    assert f"-cpu {KVM_CPUS[first]}" in verdict.reason


def test_kvm_is_of_no_use_where_qemu_starts_with_no_cpu(tmp_path: Path) -> None:
    verdict = tried(USABLE, qemu(tmp_path))
    assert not verdict.usable
    assert verdict.reason == "a tiny guest ran, but QEMU does not start: bad MSR"
    with pytest.raises(HostFailure):
        kvm_cpu(qemu(tmp_path))


def test_qemu_is_not_tried_where_kvm_is_of_no_use(tmp_path: Path) -> None:
    verdict = KvmVerdict(usable=False, reason="there is no /dev/kvm")
    assert tried(verdict, str(tmp_path / "missing")) == verdict


def test_a_missing_qemu_is_a_refusal(tmp_path: Path) -> None:
    assert not tried(USABLE, str(tmp_path / "missing")).usable


def test_stored_sandboxes_tell_each_cpu_option_from_the_others() -> None:
    models = {cpu_model(option) for option in KVM_CPUS}
    assert len(models) == len(KVM_CPUS)
    assert cpu_model("host,-arch-capabilities") == f"{cpu_model('host')},-arch-capabilities"
    assert cpu_model("max") == "max"
