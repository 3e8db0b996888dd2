"""Work on files that a stranger made: on a file system of its own, by programs in a jail.

Both are gone with the threads and processes that have them, also where a server is killed.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.patience import patience

from . import mounts
from .commands import ENVIRONMENT
from .jail import Jail, View, apart

T = TypeVar("T")

_MOUNT_SEC: Final = 120.0
_OPTIONS: Final = "loop,nosuid,nodev,noexec,noatime,noinit_itable"
_CAPABILITIES: Final = ("chown", "dac_override", "fowner", "fsetid")
"""Without `dac_read_search`: by handles of files it would lead out of any mount."""
_NODES: Final = ("mknod", "setfcap")


def mounted(filesystem: Path, at: Path, work: Callable[[], T]) -> T:
    """The result of work that alone sees an ext4 file system, of a file, at a directory.

    The work runs in a thread of its own; it may start others and programs, and waits for them.
    Nothing of the file system can be run or opened as a device. Needs root. Raises HostFailure
    where this host mounts no files, and what the work raises. Blocks.
    """

    def inside() -> T:
        mounts.unshare(mounts.NEW_FS | mounts.NEW_MOUNTS)
        mounts.seclude()
        _run(["mount", "-t", "ext4", "-o", _OPTIONS, str(filesystem), str(at)])
        try:
            return work()
        finally:
            with suppress(HostFailure):  # it goes with the thread at the latest
                _run(["umount", str(at)])

    return apart(inside)


def in_jail(jail: Jail, view: View, work: Callable[[Sequence[str]], T]) -> T:
    """The result of work whose programs run in a jail; it is given what their commands begin with.

    They are root's for files alone: they may give them any owner, mode and attribute, and make
    device nodes. There is no network. They end with the thread of the work, which may start one of
    them. Needs root. Raises OSError and what the work raises. Blocks.
    """
    kept = ",".join(f"+{each}" for each in (*_CAPABILITIES, *_NODES))
    prefix = (
        *("setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{kept}"),
        *("--clear-groups", "--pdeathsig=KILL", "--"),
    )

    def inside() -> T:
        mounts.unshare(mounts.NEW_NET)
        jail.enter(view)
        return work(prefix)

    return apart(inside)


def _run(argv: Sequence[str]) -> None:
    try:
        subprocess.run(
            argv,
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env={**ENVIRONMENT, "PATH": os.defpath + ":/usr/sbin:/sbin"},
            timeout=patience(_MOUNT_SEC),
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
        raise HostFailure(
            "This host cannot mount a file system from a file",
            detail=f"{error}: {said.decode('utf-8', 'replace')[:2000]}",
        ) from error
