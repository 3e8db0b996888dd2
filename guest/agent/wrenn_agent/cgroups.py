"""The guest's control groups: commands live below one bound, the agent above it.

    /agent                 this process: most of the CPU whenever it wants it, its memory protected
    /commands              all commands together: bounded in processes and memory
    /commands/command-N    one command and all that it starts

Commands see `/commands` as the root of a cgroup namespace, so that what manages groups of its own
(a container engine) does so within the bound. Format and rules: the kernel's cgroup-v2 document.
"""

from __future__ import annotations

import errno
import os
from collections import deque

from .errors import ResourceExhausted
from .loop import report
from .syscalls import (
    MNT_DETACH,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    enter_cgroup_namespace,
    mount,
    new_cgroup_namespace,
    umount,
)

_MOUNT_POINT = "/sys/fs/cgroup"
_NAMESPACE = "/proc/self/ns/cgroup"
_AGENT, _COMMANDS = "agent", "commands"
_AGENT_CPU_WEIGHT = b"10000"
_AGENT_MEMORY = b"25165824"
"""Bytes of the agent's memory that are not reclaimed for others."""
_DEFAULT_PROCESSES, _DEFAULT_RESERVED = 4096, 32 << 20
_LEFT_TO_OTHERS = 8
"""One command may have all processes but an eighth: the next one finds room."""
_LOOKED_AT = 4
"""How many groups a start looks at for one that has become empty."""
_TRIES = 3


class CommandGroup:
    """The control group of one command; its files stay open, since it is used again and again."""

    __slots__ = ("_groups", "events", "max_processes", "name", "procs")

    def __init__(self, groups: CommandGroups, name: str, procs: int, events: int) -> None:
        self._groups = groups
        self.name = name
        self.procs = procs
        self.events = events
        self.max_processes = 0

    def kill(self) -> None:
        """Send SIGKILL to everything in it, whatever that has become since; raises OSError."""
        _write(self._groups.root, f"{_COMMANDS}/{self.name}/cgroup.kill", b"1")

    def release(self) -> None:
        """Its command has ended; what that left running in it goes on."""
        self._groups.used.append(self)

    def close(self) -> None:
        """Close its files."""
        os.close(self.procs)
        os.close(self.events)


class CommandGroups:
    """Groups for commands, made when needed and used again once they are empty.

    As a context the agent itself is in an empty group, and in its namespace, to start a command: a
    process is born where its parent is, so it cannot outrun its limits.
    """

    def __init__(self, root: int, own_namespace: int, namespace: int) -> None:
        """`root` is a descriptor of the hierarchy's root, the namespaces are its and commands'."""
        self.root = root
        self._own_namespace = own_namespace
        self._namespace = namespace
        self._home = self._open(f"{_AGENT}/cgroup.procs", os.O_WRONLY)
        self._freezer = self._open(f"{_COMMANDS}/cgroup.freeze", os.O_RDWR)
        self._count = 0
        self.used: deque[CommandGroup] = deque()
        """Groups whose commands have ended; something may go on running in them."""
        self._wanted = (0, 0)
        self._max_processes = 0
        self.limit(_DEFAULT_PROCESSES, _DEFAULT_RESERVED)

    @classmethod
    def set_up(cls) -> CommandGroups:
        """Make the groups; the agent goes to its own.

        The hierarchy is mounted anew, as commands are to see it. Raises OSError.
        """
        root = os.open(_MOUNT_POINT, os.O_RDONLY | os.O_DIRECTORY)
        own = os.open(_NAMESPACE, os.O_RDONLY)
        for name in (_AGENT, _COMMANDS):
            _make_directory(name, root)
        _enable_controllers(root, ".")
        _write(root, f"{_COMMANDS}/cgroup.procs", b"0")
        try:
            new_cgroup_namespace()
            commands = os.open(_NAMESPACE, os.O_RDONLY)
            umount(_MOUNT_POINT, MNT_DETACH)
            mount("cgroup2", _MOUNT_POINT, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, "")
        finally:
            enter_cgroup_namespace(own)
            _write(root, f"{_AGENT}/cgroup.procs", b"0")
        _enable_controllers(root, _COMMANDS, only=("cpu", "pids"))
        for name, value in (("cpu.weight", _AGENT_CPU_WEIGHT), ("memory.min", _AGENT_MEMORY)):
            _write_if_there(root, f"{_AGENT}/{name}", value)
        return cls(root, own, commands)

    def limit(self, processes: int, reserved: int) -> None:
        """Bound all commands together: number of processes, and bytes of memory they leave free."""
        if (processes, reserved) == self._wanted:
            return
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = max(total - reserved, reserved)
        _write_if_there(self.root, f"{_COMMANDS}/pids.max", b"%d" % processes)
        _write_if_there(self.root, f"{_COMMANDS}/memory.max", b"%d" % memory)
        self._max_processes = processes - processes // _LEFT_TO_OTHERS
        self._wanted = (processes, reserved)

    def limits(self) -> dict[str, int]:
        """How many processes all commands have, and the bounds in force; memory in bytes."""
        found = {
            "process_count": self._number(f"{_COMMANDS}/pids.current") or 0,
            "process_limit": self._number(f"{_COMMANDS}/pids.max"),
            "mem_limit": self._number(f"{_COMMANDS}/memory.max"),
        }
        return {name: number for name, number in found.items() if number is not None}

    def __enter__(self) -> CommandGroup:
        """Go into an empty group; raises ResourceExhausted, at home then."""
        for _ in range(_TRIES):
            group = self._take()
            try:
                self._thaw()
                os.pwrite(group.procs, b"0", 0)
                enter_cgroup_namespace(self._namespace)
            except OSError as error:
                failure = error
                self.__exit__()
                group.close()  # divided or made unusable by what ran in it: never taken again
            else:
                return group
        raise ResourceExhausted("no control group can be used for the command") from failure

    def _take(self) -> CommandGroup:
        for _ in range(min(_LOOKED_AT, len(self.used))):
            group = self.used.popleft()
            try:
                events = os.pread(group.events, 4096, 0)
            except OSError:
                group.close()  # somebody has removed it
                continue
            if b"populated 0" in events and b"frozen 0" in events:
                return self._bounded(group)
            self.used.append(group)
        try:
            return self._bounded(self._new())
        except OSError as error:
            raise ResourceExhausted("no control group can be made for the command") from error

    def _new(self) -> CommandGroup:
        self._count += 1
        name = f"command-{self._count}"
        _make_directory(f"{_COMMANDS}/{name}", self.root)
        procs = self._open(f"{_COMMANDS}/{name}/cgroup.procs", os.O_WRONLY)
        try:
            events = self._open(f"{_COMMANDS}/{name}/cgroup.events", os.O_RDONLY)
        except OSError:
            os.close(procs)
            raise
        return CommandGroup(self, name, procs, events)

    def __exit__(self, *_exc: object) -> None:
        """Go home; the next start tries again where that fails."""
        try:
            enter_cgroup_namespace(self._own_namespace)
            os.pwrite(self._home, b"0", 0)
        except OSError as error:
            report(error)

    def _bounded(self, group: CommandGroup) -> CommandGroup:
        if group.max_processes != self._max_processes:
            path = f"{_COMMANDS}/{group.name}/pids.max"
            _write_if_there(self.root, path, b"%d" % self._max_processes)
            group.max_processes = self._max_processes
        return group

    def _thaw(self) -> None:
        """An agent that went into a frozen group would never come out of it."""
        if os.pread(self._freezer, 1, 0) != b"0":
            os.pwrite(self._freezer, b"0", 0)

    def _number(self, path: str) -> int | None:
        try:
            value = _read(self.root, path).strip()
        except OSError:
            return None
        return int(value) if value.isdigit() else None

    def _open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, dir_fd=self.root)


def _make_directory(path: str, root: int) -> None:
    try:
        os.mkdir(path, 0o755, dir_fd=root)
    except FileExistsError:
        return


def _enable_controllers(root: int, group: str, only: tuple[str, ...] | None = None) -> None:
    for name in _read(root, f"{group}/cgroup.controllers").decode().split():
        if only is None or name in only:
            try:
                _write(root, f"{group}/cgroup.subtree_control", f"+{name}".encode())
            except OSError as error:
                report(error)


def _read(root: int, path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY, dir_fd=root)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _write(root: int, path: str, value: bytes) -> None:
    fd = os.open(path, os.O_WRONLY, dir_fd=root)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def _write_if_there(root: int, path: str, value: bytes) -> None:
    """Write a file that belongs to a controller, unless the kernel has none of this kind."""
    try:
        _write(root, path, value)
    except OSError as error:
        if error.errno != errno.ENOENT:
            report(error)
