"""With which processor this machine's QEMU starts, and whether under its KVM."""

import os
import subprocess
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.spawn import kvm_groups
from wrenn_sandbox.host.probe import KVM_DEVICE, KvmVerdict
from wrenn_sandbox.patience import patience

from .command import ENFORCE, KVM_CPUS, MACHINE, OF_THIS_HOST

_TRIAL_SEC: Final = 30.0
_REFUSED: Final = "QEMU does not start under KVM"


def kvm_cpu(binary: str, device: Path = KVM_DEVICE) -> str:
    """The first of `KVM_CPUS` with which QEMU starts a VM; blocks.

    Raises `HostFailure` with what QEMU said to the first one where it starts with none, and where
    the users that VMMs run as may not open the device.
    """
    if not _is_for_vmms(device):
        raise HostFailure(_REFUSED, detail=f"root alone may open {device}; let a group open it")
    refusals = []
    for cpu in KVM_CPUS:
        refusal = _refusal(binary, cpu, "kvm")
        if refusal is None:
            return cpu
        refusals.append(refusal)
    raise HostFailure(_REFUSED, detail=refusals[0])


def named_cpu(model: str, binary: str, accelerator: str) -> str:
    """The option for a model that the operator names; blocks.

    Guests get all of it or do not start. Raises `HostFailure` where QEMU refuses it.
    """
    option = model if model in OF_THIS_HOST else f"{model},{ENFORCE}"
    refusal = _refusal(binary, option, accelerator)
    if refusal is not None:
        raise HostFailure(
            f"WRENN_CPU_MODEL: this host cannot give guests a {model} under {accelerator};"
            " `wrenn doctor` lists the models that it can",
            detail=refusal,
        )
    return option


def tried(verdict: KvmVerdict, binary: str, device: Path = KVM_DEVICE) -> KvmVerdict:
    """The verdict on KVM, once QEMU has started under it too; blocks."""
    if not verdict.usable:
        return verdict
    try:
        cpu = kvm_cpu(binary, device)
    except HostFailure as error:
        return KvmVerdict(False, f"{verdict.reason}, but QEMU does not start: {error.detail}")
    return msgspec.structs.replace(
        verdict, cpu=cpu, reason=f"{verdict.reason}; QEMU starts with -cpu {cpu}"
    )


def _is_for_vmms(device: Path) -> bool:
    """Root's VMMs run as other users; those of another server as the one that ran the probe.

    What is not there QEMU refuses in its own words.
    """
    if os.geteuid() != 0 or not device.exists():
        return True
    return bool(kvm_groups(device)) or device.stat().st_mode & 0o006 == 0o006


def _refusal(binary: str, cpu: str, accelerator: str) -> str | None:
    """The last that QEMU says where it does not start, None where it does.

    KVM takes a processor's registers when the VM is made: what it refuses shows without a guest.
    """
    argv = [binary, "-M", MACHINE, "-accel", accelerator, "-cpu", cpu, "-m", "16", "-S"]
    options = ["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "stdio"]
    try:
        done = subprocess.run(
            [*argv, *options],
            input="quit\n",
            capture_output=True,
            check=False,
            timeout=patience(_TRIAL_SEC),
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"status {done.returncode}"
