"""Looking at processes from outside, and waiting for what has no event."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from wrenn_sandbox.patience import patience

PATIENCE = patience(20.0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def exists(pid: int) -> bool:
    """Whether the process is there, be it as a zombie."""
    return Path(f"/proc/{pid}").exists()


def resident(pid: int) -> int:
    """Bytes of memory in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def pipes(pid: int) -> int:
    """How many ends of pipes a process has open."""
    links = (os.readlink(each.path) for each in os.scandir(f"/proc/{pid}/fd"))
    return sum(link.startswith("pipe:") for link in links)


def cpu_seconds(pid: int) -> float:
    """Time on a CPU so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_quiet(pid: int) -> None:
    """Wait until a process has not used the CPU for a while."""
    seen, since = -1.0, time.monotonic()

    def quiet() -> bool:
        nonlocal seen, since
        used = cpu_seconds(pid)
        if used != seen:
            seen, since = used, time.monotonic()
        return time.monotonic() - since > 0.3

    wait_until(quiet)
