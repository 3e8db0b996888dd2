"""What the figures were measured on, in one line."""

import os
import platform
import re
import subprocess
from pathlib import Path

from wrenn_sandbox.host.vmm.qemu.command import BINARY


def describe() -> str:
    """Processors, memory, QEMU, kernel and how busy the machine was before."""
    info = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    version = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return ", ".join(
        [
            f"{os.cpu_count()} x {model.group(1) if model else 'unknown processor'}",
            f"{pages >> 30} GB",
            version.stdout.splitlines()[0],
            f"Linux {platform.release()}",
            f"load {os.getloadavg()[0]:.1f}",
        ]
    )
