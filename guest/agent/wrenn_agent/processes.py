"""All commands of this guest, and the reaping of every child."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from .drain import Drain
from .errors import NotFound, ResourceExhausted
from .loop import Loop
from .output import Budget, Reader
from .process import Process
from .spawn import Command, Spawner

MAX_PROCESSES = 1024
_KEPT_ENDED = 32
_KEPT_SECONDS = 300.0
_REAPED_PER_ROUND = 512


class Processes:
    """Running commands by pid, and for a while those that ended before anyone heard the end."""

    def __init__(self, loop: Loop, spawner: Spawner) -> None:
        self._loop = loop
        self._spawner = spawner
        self._budget = Budget()
        self._drain = Drain(loop)
        self._running: dict[int, Process] = {}
        self._unheard: dict[int, Process] = {}

    def start(self, command: Command, tag: str) -> Process:
        """Start a command; raises as `Spawner.spawn` does."""
        if len(self._running) >= MAX_PROCESSES:
            raise ResourceExhausted(f"more than {MAX_PROCESSES} commands are running")
        started = time.monotonic()
        spawned = self._spawner.spawn(command)
        self._drop_unheard(spawned.pid)
        process = Process(
            self._loop, self._budget, command, tag, spawned, started, self._drain, self._on_end
        )
        self._running[process.pid] = process
        return process

    def running(self) -> list[Process]:
        """All commands that have not ended."""
        return list(self._running.values())

    def find(self, pid: int, tag: str, ended_too: bool = False) -> Process:
        """The newest command with this pid (or, without one, this tag); raises NotFound."""
        tables = (self._running, self._unheard) if ended_too else (self._running,)
        for table in tables:
            if pid:
                if pid in table:
                    return table[pid]
                continue
            for process in reversed(table.values()):
                if process.tag == tag:
                    return process
        raise NotFound(f"process {pid or repr(tag)} does not exist")

    def signal(self, process: Process, number: int) -> None:
        """Signal the process group; SIGKILL goes to all that the command has started.

        Raises NotFound when it is gone.
        """
        killed = False
        if number == signal.SIGKILL and process.group is not None:
            with contextlib.suppress(OSError):  # root in the guest can remove groups
                process.group.kill()
                killed = True
        try:
            process.signal_group(number)  # it may have moved to another control group
        except NotFound:
            if not killed:
                raise

    def kill_all(self) -> None:
        """Kill the group of every running command; the agent is about to end."""
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Collect every child that has died, commands and adopted orphans alike."""
        for _ in range(_REAPED_PER_ROUND):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self._running.get(pid)
            if process is not None and process.status is None:
                process.exited(status)
        self._loop.call_later(0, self.reap)

    def release(self, process: Process, reader: Reader, told: bool) -> None:
        """A reader leaves; `told`: it has been sent everything up to the end."""
        process.output.detach(reader)
        process.resume()
        if told and self._unheard.get(process.pid) is process:
            del self._unheard[process.pid]
        forgotten = process.ended and self._unheard.get(process.pid) is not process
        if forgotten and not process.output.has_readers:
            process.output.clear()

    def _on_end(self, process: Process) -> None:
        del self._running[process.pid]
        if process.group is not None:
            process.group.release()
        self._unheard[process.pid] = process
        oldest = next(iter(self._unheard.values()))
        if len(self._unheard) > _KEPT_ENDED or oldest.ended_before(_KEPT_SECONDS):
            self._drop_unheard(oldest.pid)

    def _drop_unheard(self, pid: int) -> None:
        process = self._unheard.pop(pid, None)
        if process is not None and not process.output.has_readers:
            process.output.clear()
