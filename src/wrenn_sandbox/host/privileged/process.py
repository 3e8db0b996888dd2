"""Processes told apart by pid *and* start time, so that a reused pid is never mistaken.

Everything goes through a pidfd: it stays with the one process, also when that process is not
a child of this server (a VM that outlived the server which started it).
"""

import asyncio
import os
import re
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from wrenn_sandbox.errors import HostFailure

PROC = Path("/proc")
_USER_TIME_FIELD = 14
_START_TIME_FIELD = 22


def process_start_time(pid: int) -> int:
    """Clock ticks from boot to the start of the process (field 22 of /proc/PID/stat).

    Raises `ProcessLookupError` when there is no such process.
    """
    try:
        text = (PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    after_name = text[text.rindex(")") + 2 :].split()
    return int(after_name[_START_TIME_FIELD - 3])


def cpu_seconds(pid: int, start_time: int) -> float:
    """What exactly this process has used of CPUs, its threads included; 10 ms precise.

    Raises `ProcessLookupError` when it is gone.
    """
    try:
        text = (PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    fields = text[text.rindex(")") + 2 :].split()
    if int(fields[_START_TIME_FIELD - 3]) != start_time:
        raise ProcessLookupError(f"process {pid} is another one now")
    user, system = (int(each) for each in fields[_USER_TIME_FIELD - 3 :][:2])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def pidfd_open(pid: int, start_time: int) -> int:
    """A pidfd of exactly this process. Raises `ProcessLookupError` when it is gone."""
    fd = os.pidfd_open(pid)
    try:
        if process_start_time(pid) != start_time:
            raise ProcessLookupError(f"process {pid} is another one now")
    except BaseException:
        os.close(fd)
        raise
    return fd


class ProcessHandle:
    """A running process: our child, or one that was adopted. Close it when done."""

    def __init__(self, pid: int, start_time: int, pidfd: int) -> None:
        self.pid = pid
        self.start_time = start_time
        self._pidfd = pidfd
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def adopt(cls, pid: int, start_time: int) -> "ProcessHandle":
        """Raises `ProcessLookupError` when exactly this process is gone or a zombie."""
        handle = cls(pid, start_time, pidfd_open(pid, start_time))
        if not handle.alive:
            handle.close()
            raise ProcessLookupError(f"process {pid} has ended")
        return handle

    @classmethod
    def of_child(cls, child: "subprocess.Popen[bytes]") -> "ProcessHandle":
        """Take over a child that nobody else waits for."""
        start_time = process_start_time(child.pid)
        handle = cls(child.pid, start_time, pidfd_open(child.pid, start_time))
        handle._child = child
        return handle

    @property
    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        return not _has_ended(self._pidfd, 0)

    def duplicate(self) -> int:
        """A pidfd of the process, for one that may watch it but has no right to it."""
        return os.dup(self._pidfd)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process; one that has ended is no error."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int | None:
        """Wait for the end; the status as `Popen.returncode` gives it, None if not our child.

        Any number of tasks may wait.
        """
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        own = os.dup(self._pidfd)  # a loop watches a descriptor for one reader only
        try:
            loop.add_reader(own, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(own)
        finally:
            os.close(own)
        return None if self._child is None else self._child.wait()

    async def kill(self) -> int | None:
        """SIGKILL; returns when it is reaped, as `wait` does."""
        self.signal(signal.SIGKILL)
        return await self.wait()

    def close(self) -> None:
        """Let go of the process; it runs on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child is not None and self._child.poll() is None:
            self._child.returncode = 0  # it outlives this handle on purpose


def runs(pid: int, start_time: int) -> bool:
    """Whether exactly this process runs; a zombie does not."""
    try:
        ProcessHandle.adopt(pid, start_time).close()
    except ProcessLookupError:
        return False
    return True


def processes_in_netns(inode: int) -> list[int]:
    """Pids of the processes whose main thread is in the network namespace with this inode."""
    wanted = f"net:[{inode}]"
    found = []
    for entry in os.listdir(PROC):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            if os.readlink(PROC / entry / "ns" / "net") == wanted:
                found.append(int(entry))
        except OSError:
            continue  # it ended meanwhile
    return found


def kill_now(pid: int) -> None:
    """SIGKILL a process and wait for its end, a second at most; blocks."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            _has_ended(fd, 1000)
        finally:
            os.close(fd)


def _has_ended(pidfd: int, wait_ms: int) -> bool:
    """Whether the process, maybe a zombie now, ends within so many milliseconds; blocks."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_ms))


def own_memory(pid: int) -> int:
    """Bytes of memory that a process shares with no other; raises `HostFailure`. Blocks."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8")
    except OSError as error:
        raise HostFailure("The machine is gone", detail=str(error)) from error
    found = re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
