"""Setting up a VM's user space, as its first process."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import struct

from .cgroups import CommandGroups
from .kernel import offer_modules, raise_limits
from .loop import report
from .syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, mount

_MOUNTS = (
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
)
_ON_DISK = ("/tmp",)
"""Directories that may as well be part of the disk: mounted only when the root is read-only."""
_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)
_NICE = -10
_OPEN_FILES = (65536, 1048576)
"""Of commands, soft and hard: databases and build tools ask for 64000."""
_RUNTIME = "/run/.wrenn"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def set_up() -> CommandGroups | None:
    """Do what an init does; a step that fails is reported and does not stop the others.

    Returns the control groups of commands; None where they cannot be made.
    """
    for step in (
        _mount_all,
        _make_links,
        _bring_up_loopback,
        _raise_open_files,
        raise_limits,
        _offer_modules,
        _stay_responsive,
    ):
        try:
            step()
        except (OSError, ValueError) as error:
            report(error)
    try:
        return CommandGroups.set_up()
    except OSError as error:
        report(error)
        return None


def _mount_all() -> None:
    mounted = _mount_points()
    for source, target, kind, flags, data in _MOUNTS:
        if target in mounted or (target in _ON_DISK and os.access(target, os.W_OK)):
            continue
        try:
            os.makedirs(target, exist_ok=True)
            mount(source, target, kind, flags, data)
        except OSError as error:
            if error.errno != errno.EBUSY:
                report(error)


def _mount_points() -> set[str]:
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            return {line.split(" ")[1] for line in file}
    except OSError:
        return set()


def _make_links() -> None:
    for target, link in _LINKS:
        if not os.path.lexists(link):
            os.symlink(target, link)


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _raise_open_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def _offer_modules() -> None:
    offer_modules(_RUNTIME)


def _stay_responsive() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # commands start with the ordinary priority, whatever the agent's
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
