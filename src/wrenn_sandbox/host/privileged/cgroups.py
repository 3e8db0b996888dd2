"""Bounds on what each machine takes of this host: groups of the unified hierarchy (cgroup v2).

    <where it is mounted>/wrenn-<tag of the data directory>/<machine id>/

Beside the group of the server and not below it: machines outlive the server, and a group with
processes of its own can have none below it. Sealed memory that machines share was first touched by
the server and counts as the server's. (Kernel: Documentation/admin-guide/cgroup-v2.rst.)
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

CONTROLLERS: Final = ("memory", "cpu", "pids")
_PERIOD_USEC: Final = 100_000
_MOUNTS: Final = Path("/proc/self/mountinfo")
_CHILDREN: Final = "cgroup.subtree_control"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one machine may take: bytes, processors, threads."""

    memory: int
    cpus: float
    threads: int

    def files(self, controller: str) -> dict[str, str]:
        """What to write where for a controller; swap is bounded where the kernel counts it."""
        if controller == "memory":
            return {
                "memory.max": str(self.memory),
                "memory.swap.max": str(self.memory),
                "memory.oom.group": "1",
            }
        if controller == "cpu":
            return {"cpu.max": f"{round(self.cpus * _PERIOD_USEC)} {_PERIOD_USEC}"}
        return {"pids.max": str(self.threads)} if controller == "pids" else {}


def hierarchy(mounts: Path = _MOUNTS) -> Path | None:
    """Where the unified hierarchy is mounted, if anywhere."""
    for line in mounts.read_text("utf-8", "surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            return Path(before.split()[4])
    return None


def usable(root: Path | None) -> tuple[str, ...]:
    """The controllers that groups below `root` can have; changes nothing.

    Only the kernel's own topmost group, which has no type, may have both processes and groups
    with controllers below it.
    """
    if root is None or not os.access(root, os.W_OK):
        return ()
    with contextlib.suppress(OSError):
        inherited = _words(root / _CHILDREN)
        topmost = not (root / "cgroup.type").exists()
        free = topmost or not _words(root / "cgroup.procs")
        found = _words(root / "cgroup.controllers") if free else inherited
        return tuple(each for each in CONTROLLERS if each in found)
    return ()


class Groups:
    """The groups of one data directory's machines, bounded by some of the controllers.

    `run` has a directory for each machine there is, named as its group.
    """

    def __init__(self, directory: Path, run: Path, controllers: tuple[str, ...]) -> None:
        self.controllers = controllers
        self._directory = directory
        self._run = run

    def _prepare(self) -> None:
        self._directory.mkdir(exist_ok=True)
        for group in (self._directory.parent, self._directory):
            for missing in set(self.controllers) - set(_words(group / _CHILDREN)):
                (group / _CHILDREN).write_text(f"+{missing}")

    @classmethod
    def make(cls, root: Path, name: str, run: Path, controllers: tuple[str, ...]) -> Self:
        """Raises OSError where that is not allowed after all."""
        groups = cls(root / name, run, controllers)
        groups._prepare()
        return groups

    def open(self, machine: str, bounds: Bounds) -> int:
        """Make a machine's group; a process whose id is written to the descriptor is in it.

        Raises OSError.
        """
        group = self._directory / machine
        try:
            group.mkdir(exist_ok=True)
        except FileNotFoundError:  # another program of this data directory has closed its own
            self._prepare()
            group.mkdir(exist_ok=True)
        for controller in self.controllers:
            for name, value in bounds.files(controller).items():
                if name != "memory.swap.max" or (group / name).exists():
                    (group / name).write_text(value)
        return os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def remove(self, machine: str) -> None:
        """Remove the group of a machine that has ended; `sweep` does where this comes too early."""
        with contextlib.suppress(OSError):
            (self._directory / machine).rmdir()

    def sweep(self) -> None:
        """Remove the groups of machines that are no more."""
        with contextlib.suppress(FileNotFoundError):
            for group in self._directory.iterdir():
                if group.is_dir() and not (self._run / group.name).exists():
                    self.remove(group.name)

    def close(self) -> None:
        """Remove what holds the groups, unless machines run on in there."""
        with contextlib.suppress(OSError):
            self.sweep()
            self._directory.rmdir()


def _words(path: Path) -> list[str]:
    return path.read_text("ascii").split()
