"""Becoming another user by system call, for one thread alone.

The C library's own calls would change every thread of the server. Numbers are from
linux/capability.h, linux/prctl.h and the kernel's tables of system calls.
"""

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from typing import Final

_SETGROUPS, _SETRESGID, _SETRESUID, _CAPGET, _CAPSET = {
    "x86_64": (116, 119, 117, 125, 126),
}.get(os.uname().machine, (159, 149, 147, 90, 91))
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_TRACEABLE: Final = 1
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522
_CAPABILITIES: Final = 64
"""As many as there can be; those that this kernel does not know end the list."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Identity:
    """The user a process runs as: uid and gid are the same number, plus groups such as kvm's."""

    uid: int
    groups: tuple[int, ...] = ()


def become(identity: Identity) -> None:
    """Make the calling thread, and what it starts, this user without any capability, for good.

    Nothing that it starts can get them back. For threads of root's that end once they have started
    something: what they do until then is done as that user. Nobody may trace the server or have
    its core from then on, since its memory is that thread's too. Raises OSError, after which the
    thread is good for nothing.
    """
    for number in range(_CAPABILITIES):
        if not _dropped(number):
            break
    _inherit_nothing()
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "ambient set")
    groups = (ctypes.c_uint32 * len(identity.groups))(*identity.groups)
    _check(_libc.syscall(_SETGROUPS, len(groups), groups), "setgroups")
    _check(_libc.syscall(_SETRESGID, *[identity.uid] * 3), "setresgid")
    _check(_libc.syscall(_SETRESUID, *[identity.uid] * 3), "setresuid")
    if _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == _TRACEABLE:  # where fs.suid_dumpable is 1
        _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _dropped(number: int) -> bool:
    """Take a capability out of the bounding set; false where there is no such one."""
    if _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EINVAL:
        return False
    raise OSError(code, f"bounding set: {os.strerror(code)}")


def _inherit_nothing() -> None:
    """Empty the inheritable set; the others go with the user."""
    head = struct.pack("<Ii", _CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.syscall(_CAPGET, head, data), "capget")
    numbers = list(struct.unpack("<6I", data.raw))
    numbers[2] = numbers[5] = 0
    _check(_libc.syscall(_CAPSET, head, struct.pack("<6I", *numbers)), "capset")


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
