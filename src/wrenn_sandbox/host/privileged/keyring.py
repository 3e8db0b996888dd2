"""The kernel's keys: a process hands on those it holds, whatever user its child becomes."""

import ctypes
import errno
import os
from typing import Final

_KEYCTL: Final = {"x86_64": 250}.get(os.uname().machine, 219)
_JOIN_SESSION_KEYRING: Final = 1
_TOLERATED: Final = (errno.ENOSYS, errno.EPERM, errno.EDQUOT)
"""Kernels and containers without keys, or with few of them, as where root is not the real one."""
_libc = ctypes.CDLL(None, use_errno=True)


def leave_session_keyring() -> None:
    """Give the calling thread, and what it starts, an empty keyring in the server's place.

    A server that somebody started by hand holds the keys of root's login: to use, and to revoke.
    Without root nothing is done: machines run as the server's own user then. Raises OSError.
    (Manual page keyctl(2); linux/keyctl.h.)
    """
    if os.geteuid() != 0:
        return
    if _libc.syscall(_KEYCTL, _JOIN_SESSION_KEYRING, None) >= 0:
        return
    code = ctypes.get_errno()
    if code not in _TOLERATED:
        raise OSError(code, f"session keyring: {os.strerror(code)}")
