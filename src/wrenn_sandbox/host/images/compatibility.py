"""Whether a stored machine can be continued here. Asked before anything is started."""

from typing import Final

from wrenn_sandbox.errors import IncompatibleImage

from .manifest import Machine

_TSC_TOLERANCE: Final = 0.001
_OWN: Final = "its own"
_NAMES: Final = {
    "vcpus": "number of vcpus",
    "memory_mb": "memory size",
    "cpu_model": "CPU model",
    "accelerator": "accelerator",
    "vmm": "machine monitor",
    "vmm_version": "version of the machine monitor",
    "network": "kind of network",
    "kernel_sha256": "kernel",
    "firmware": "firmware",
}


def differences(stored: Machine, here: Machine) -> list[str]:
    """What of a stored machine is not as this host would make it, in words; empty if it fits."""
    found = [
        f"{words} ({getattr(stored, field) or _OWN}, here {getattr(here, field) or _OWN})"
        if field != "kernel_sha256"
        else words
        for field, words in _NAMES.items()
        if getattr(stored, field) != getattr(here, field)
    ]
    if abs(stored.tsc_khz - here.tsc_khz) > _TSC_TOLERANCE * max(stored.tsc_khz, here.tsc_khz):
        found.append(f"clock rate ({stored.tsc_khz} kHz, here {here.tsc_khz} kHz)")
    return found


def require(stored: Machine, here: Machine) -> None:
    """Raise `IncompatibleImage` that names the differences, if there are any."""
    found = differences(stored, here)
    if found:
        raise IncompatibleImage(
            "The stored machine does not fit this host; another " + ", ".join(found) + "."
        )
