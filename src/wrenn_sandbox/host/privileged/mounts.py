"""Namespaces and mounts by system call: what the standard library does not have (Linux 5.12).

All of it acts on the calling thread alone and raises OSError. Numbers are from linux/sched.h,
linux/mount.h and, for the calls without a wrapper in the C library, from the table that all
architectures share.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

NEW_FS: Final = 0x0000_0200
"""Not a namespace: the thread's root and working directory become its own."""
NEW_MOUNTS: Final = 0x0002_0000
NEW_UTS: Final = 0x0400_0000
NEW_IPC: Final = 0x0800_0000
NEW_PIDS: Final = 0x2000_0000
NEW_NET: Final = 0x4000_0000

READ_ONLY: Final = 0x1
"""These four have the same numbers in `mount` and in `mount_setattr`."""
NO_SUID: Final = 0x2
NO_DEVICES: Final = 0x4
NO_EXEC: Final = 0x8
DATA_ONLY: Final = NO_SUID | NO_DEVICES | NO_EXEC

_MOUNT_SETATTR, _OPEN_TREE, _MOVE_MOUNT = 442, 428, 429
_PIVOT_ROOT: Final = {"x86_64": 155}.get(os.uname().machine, 41)
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 1
_MOVE_FROM_FD: Final = 0x4
_MS_REC, _MS_PRIVATE = 0x4000, 0x4_0000
_MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns"))


def unshare(flags: int) -> None:
    """Give the thread, or the processes it starts, namespaces of their own."""
    _check(_libc.unshare(flags), "unshare")


def enter(namespace: int, kind: int = 0) -> None:
    """Enter the namespace of a descriptor. Entering mounts needs `NEW_FS` to be unshared."""
    _check(_libc.setns(namespace, kind), "setns")


def seclude() -> None:
    """Let no mount of this namespace take part in what happens in another one, and back."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, "")


def clone(path: Path, flags: int, *, tree: bool = False) -> int:
    """A descriptor of a mount of its own of a file or directory, attached nowhere yet.

    With `tree` what is mounted below is part of it. The flags hold for all of it.
    """
    recursive = _AT_RECURSIVE if tree else 0
    how = _OPEN_TREE_CLONE | os.O_CLOEXEC | recursive
    fd = _check(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), how), f"clone {path}")
    try:
        _set(fd, b"", _AT_EMPTY_PATH | recursive, flags)
    except BaseException:
        os.close(fd)
        raise
    return fd


def attach(mount: int, target: Path | str) -> None:
    """Put a mount that `clone` made over an existing file or directory."""
    done = _libc.syscall(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _MOVE_FROM_FD)
    _check(done, f"attach {target}")


def mount_tmpfs(target: Path | str, flags: int) -> None:
    """An empty file system in memory, writable until `restrict`; it has room for names alone."""
    _mount("tmpfs", target, "tmpfs", flags, "mode=755,size=256k,nr_inodes=4096")


def mount_proc(target: Path | str) -> None:
    """A `/proc` that shows a process itself and nothing else but what it may trace."""
    _mount("proc", target, "proc", READ_ONLY | DATA_ONLY, "hidepid=invisible,subset=pid")


def restrict(target: Path | str, flags: int) -> None:
    """Set flags of the mount at `target`."""
    _set(_AT_FDCWD, os.fsencode(target), 0, flags)


def pivot_root(new_root: Path) -> None:
    """Make a mount the root of this namespace and let go of all that was mounted before."""
    os.chdir(new_root)
    _check(_libc.syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def _set(fd: int, path: bytes, how: int, flags: int) -> None:
    attributes = _Attributes(set=flags, propagation=_MS_PRIVATE)
    size = ctypes.sizeof(attributes)
    done = _libc.syscall(_MOUNT_SETATTR, fd, path, how, ctypes.byref(attributes), size)
    _check(done, f"mount_setattr {os.fsdecode(path)}")


def _mount(source: str | None, target: Path | str, kind: str | None, flags: int, data: str) -> None:
    done = _libc.mount(
        None if source is None else source.encode(),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        data.encode(),
    )
    _check(done, f"mount {target}")


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
