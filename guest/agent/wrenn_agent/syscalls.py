"""System calls that the standard library does not offer."""

from __future__ import annotations

import ctypes
import os

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 2, 4, 8, 4096
IN_NONBLOCK, IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
MNT_DETACH = 2
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWCGROUP = 0x02000000

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """mount(2); raises OSError."""
    _check(
        _libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
        ),
        target,
    )


def umount(target: str, flags: int) -> None:
    """umount2(2); raises OSError."""
    _check(_libc.umount2(target.encode(), flags), target)


def new_cgroup_namespace() -> None:
    """Make a cgroup namespace whose root is the group this process is in; raises OSError."""
    _check(_libc.unshare(_CLONE_NEWCGROUP), "unshare")


def enter_cgroup_namespace(fd: int) -> None:
    """Go into a cgroup namespace, given by a descriptor; raises OSError."""
    _check(_libc.setns(fd, _CLONE_NEWCGROUP), "setns")


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, as they are of PID 1."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def inotify_init() -> int:
    """A new non-blocking inotify descriptor; raises OSError."""
    return _check(_libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC), "inotify")


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch `path`; returns the watch descriptor, raises OSError."""
    return _check(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask)), path)


def inotify_rm_watch(fd: int, watch: int) -> None:
    """Stop a watch; one that the kernel has removed already is ignored."""
    _libc.inotify_rm_watch(fd, watch)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
