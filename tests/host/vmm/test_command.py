"""What the command line says to the guest's kernel."""

from dataclasses import replace
from pathlib import Path

import pytest

from support.machine_specs import machine_spec
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.host.vmm.qemu.command import Program, Variant, command

SPEC = replace(
    machine_spec(Path("/run/vm"), Path("/file")),
    slot=Slot(index=1, netns="ns", host_ip="10.0.0.1", uid=70000),
    kernel_args="quiet",
)


def kernel_command_line(accelerator: str, spec: MachineSpec = SPEC) -> list[str]:
    variant = Variant(Program(("qemu",)), accelerator, firmware=None)
    argv = command(variant, spec, None, 0, qmp_fd=3, tap_fd=4, restore=False)
    return argv[argv.index("-append") + 1].split()


@pytest.mark.parametrize(("accelerator", "fixed"), [("tcg", True), ("kvm", False)])
def test_only_an_emulated_guest_loads_programs_at_fixed_addresses(
    accelerator: str, fixed: bool
) -> None:
    assert ("norandmaps" in kernel_command_line(accelerator)) == fixed


def test_a_guest_without_a_network_of_its_own_is_told_so() -> None:
    user_mode = replace(SPEC, slot=replace(SPEC.slot, netns=None, tap=None))
    assert "wrenn.network=none" in kernel_command_line("kvm", user_mode)
    assert "wrenn.network=none" not in kernel_command_line("kvm")


@pytest.mark.parametrize("cpu", ["host", "host,-arch-capabilities"])
def test_guests_have_the_cpu_that_the_driver_was_made_with(cpu: str) -> None:
    variant = Variant(Program(("qemu",)), "kvm", firmware=None, cpu=cpu)
    argv = command(variant, SPEC, None, 0, qmp_fd=3, tap_fd=4, restore=True)
    assert argv[argv.index("-cpu") + 1] == cpu


def test_a_restored_machine_does_not_load_what_it_would_boot_from() -> None:
    """QEMU would hold kernel and initial file system in its own memory."""
    variant = Variant(Program(("qemu",)), "tcg", firmware=None)
    argv = command(variant, SPEC, None, 0, qmp_fd=3, tap_fd=4, restore=True)
    assert not {"-kernel", "-initrd", "-append"} & set(argv)
