"""Facts about the QEMU on this host and what its processes take."""

import re
import subprocess
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.patience import patience

from .command import SECCOMP

_VERSION: Final = re.compile(rb"version (\d+)\.(\d+)\.(\d+)")


def version_of(binary: str) -> tuple[int, int, int]:
    """Major, minor and micro version of a QEMU binary; raises `HostFailure`. Blocks."""
    try:
        output = subprocess.run(
            [binary, "--version"], capture_output=True, check=True, timeout=patience(10)
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostFailure("QEMU does not run here", detail=str(error)) from error
    match = _VERSION.search(output.stdout)
    if match is None:
        raise HostFailure("QEMU did not report its version", detail=repr(output.stdout[:200]))
    major, minor, micro = map(int, match.groups())
    return major, minor, micro


def has_seccomp(binary: str) -> bool:
    """Whether a QEMU binary starts with its seccomp filter, on this kernel. Blocks."""
    argv = [binary, *SECCOMP, "-machine", "none", "-nodefaults", "-display", "none"]
    try:
        done = subprocess.run(
            [*argv, "-monitor", "stdio"],
            input=b"quit\n",
            capture_output=True,
            check=False,
            timeout=patience(10),
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def cpu_model(option: str) -> str:
    """What guests with this CPU option see.

    Under KVM that depends on this machine's processor, also where the option names another one:
    the vendor is this one's, and what this one has not got is missing.
    """
    name, *features = option.split(",")
    if name != "max":
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        here = match.group(1) if match else "unknown"
        name = here if name == "host" else f"{name} on {here}"
    return ",".join((name, *features))
