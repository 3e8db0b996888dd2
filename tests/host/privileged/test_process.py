"""Processes by pidfd: children, adopted ones, and pids that belong to somebody else now."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import uvloop

from wrenn_sandbox.host.privileged.process import (
    ProcessHandle,
    kill_now,
    pidfd_open,
    process_start_time,
)

# Starts a grandchild that outlives its parent, and prints its pid.
ORPHAN = (
    "import subprocess; p = subprocess.Popen(['sleep', '1000'], stdout=subprocess.DEVNULL,"
    " stderr=subprocess.DEVNULL);"
    "print(p.pid); p.returncode = 0"
)


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def orphan() -> int:
    return int(subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True).stdout)


def started(*argv: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(argv)


def ended() -> int:
    """A pid that nobody has."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def is_alive(pid: int, start_time: int) -> bool:
    """Whether exactly this process can be adopted."""
    try:
        ProcessHandle.adopt(pid, start_time).close()
    except ProcessLookupError:
        return False
    return True


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_start_time_tells_processes_apart(child: "subprocess.Popen[bytes]") -> None:
    start_time = process_start_time(child.pid)
    assert start_time >= process_start_time(os.getpid())
    assert is_alive(child.pid, start_time)
    assert not is_alive(child.pid, start_time + 1)
    with pytest.raises(ProcessLookupError):
        pidfd_open(child.pid, start_time + 1)


def test_a_name_with_brackets_and_blanks_is_no_trouble(tmp_path: os.PathLike[str]) -> None:
    program = os.path.join(tmp_path, "a) b (c")
    os.symlink("/bin/sleep", program)
    with subprocess.Popen([program, "1000"]) as process:
        assert process_start_time(process.pid) > process_start_time(1)
        process.kill()


def test_a_zombie_is_not_alive(child: "subprocess.Popen[bytes]") -> None:
    start_time = process_start_time(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid, start_time)


def test_no_such_process() -> None:
    pid = ended()
    with pytest.raises(ProcessLookupError):
        process_start_time(pid)
    assert not is_alive(pid, 0)


async def test_a_child_is_ended_and_reaped() -> None:
    handle = ProcessHandle.of_child(started("sleep", "1000"))
    assert is_alive(handle.pid, handle.start_time)
    assert await handle.kill() == -signal.SIGKILL
    assert not handle.alive
    assert gone(handle.pid)
    assert await handle.kill() == -signal.SIGKILL
    handle.close()
    handle.close()


async def test_the_exit_status_of_a_child() -> None:
    handle = ProcessHandle.of_child(started("sh", "-c", "exit 7"))
    assert await handle.wait() == 7
    handle.close()


async def test_an_adopted_process_is_ended() -> None:
    pid = orphan()
    handle = ProcessHandle.adopt(pid, process_start_time(pid))
    assert await handle.kill() is None
    assert not handle.alive
    handle.close()


async def test_another_process_with_the_pid_is_not_adopted() -> None:
    pid = orphan()
    start_time = process_start_time(pid)
    with pytest.raises(ProcessLookupError):
        ProcessHandle.adopt(pid, start_time - 1)
    assert is_alive(pid, start_time)
    kill_now(pid)
    assert not is_alive(pid, start_time)
    kill_now(pid)


async def test_adopting_a_process_that_is_gone() -> None:
    pid = ended()
    with pytest.raises(ProcessLookupError):
        ProcessHandle.adopt(pid, 1)


async def test_a_closed_handle_leaves_the_process_running() -> None:
    child = started("sleep", "1000")
    handle = ProcessHandle.of_child(child)
    start_time = handle.start_time
    handle.close()
    assert is_alive(child.pid, start_time)
    kill_now(child.pid)


def _many_waiters() -> list[int]:
    async def main() -> list[int]:
        before = len(os.listdir("/proc/self/fd"))
        handle = ProcessHandle.of_child(started("sleep", "1000"))
        waiting = [asyncio.create_task(handle.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        handle.signal(signal.SIGKILL)
        await asyncio.gather(*waiting[1:])
        await handle.wait()
        handle.close()
        return [before, len(os.listdir("/proc/self/fd"))]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


async def test_many_wait_for_one_process_also_on_uvloop() -> None:
    before, after = await asyncio.to_thread(_many_waiters)
    assert after == before
