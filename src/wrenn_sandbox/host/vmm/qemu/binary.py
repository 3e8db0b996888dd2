"""Facts about the QEMU on this host and what its processes take."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.patience import patience

from .command import ENFORCE, SECCOMP, Program

_VERSION: Final = re.compile(rb"version (\d+)\.(\d+)\.(\d+)")


def version_of(program: Program) -> tuple[int, int, int]:
    """Major, minor and micro version of a QEMU; raises `HostFailure`. Blocks."""
    try:
        output = subprocess.run(
            [*program.argv, "--version"],
            capture_output=True,
            check=True,
            env=_environment(program),
            timeout=patience(10),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostFailure("QEMU does not run here", detail=str(error)) from error
    match = _VERSION.search(output.stdout)
    if match is None:
        raise HostFailure("QEMU did not report its version", detail=repr(output.stdout[:200]))
    major, minor, micro = map(int, match.groups())
    return major, minor, micro


def has_seccomp(program: Program) -> bool:
    """Whether a QEMU starts with its seccomp filter, on this kernel. Blocks."""
    argv = [*program.argv, *SECCOMP, "-machine", "none", "-nodefaults", "-display", "none"]
    try:
        done = subprocess.run(
            [*argv, "-monitor", "stdio"],
            input=b"quit\n",
            capture_output=True,
            check=False,
            env=_environment(program),
            timeout=patience(10),
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _environment(program: Program) -> Mapping[str, str] | None:
    return {**ENVIRONMENT, **program.environment} if program.environment else None


def cpu_model(option: str, accelerator: str = "kvm") -> str:
    """What guests with this CPU option see.

    Under KVM that depends on this machine's processor, also where the option names another one:
    the vendor is this one's, and what this one has not got is missing unless that is enforced.
    """
    name, *features = option.split(",")
    if ENFORCE in features:
        return name if accelerator == "tcg" else f"{name} of {vendor()}"
    if name != "max":
        here = _processor("model name")
        name = here if name == "host" else f"{name} on {here}"
    return ",".join((name, *features))


def vendor() -> str:
    """Who made this machine's processor, as guests under KVM see it."""
    return _processor("vendor_id")


def _processor(fact: str) -> str:
    text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    match = re.search(rf"^{fact}\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else "unknown"
