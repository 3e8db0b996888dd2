"""Files that a VMM writes, and what may be made of them. All functions block."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.paths import MachineFiles

from .base import MachineSpec

STATE_LIMIT: Final = 16 * 1024 * 1024
"""Bytes of device state; a machine's is some ten KiB."""
LOG_LIMIT: Final = 1024 * 1024
"""Bytes of a monitor's own log; a guest can make it complain as often as it likes."""
_TAIL_BYTES: Final = 2000


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a socket that fits the 107 bytes the kernel allows, whatever its directory."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def make_own(path: Path, spec: MachineSpec, size: int = 0, data: bytes = b"") -> None:
    """A file that the machine's user may write to, in a directory where it may not.

    It begins with `data`; the rest of its `size` is a hole.
    """
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.ftruncate(fd, max(size, len(data)))
        if os.geteuid() == 0:
            os.fchown(fd, spec.slot.uid, spec.slot.uid)


def read_state(path: Path) -> bytes:
    """The device state that a monitor has written, however much that is.

    Raises OSError, also for what is no file or more than any machine's.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("the device state is not a file")
        data = file.read(STATE_LIMIT + 1)
    if not 0 < len(data) <= STATE_LIMIT:
        raise OSError(f"the device state has {len(data)} bytes or more")
    return data


def append(path: Path, text: bytes) -> None:
    """Add to a log file."""
    with open(path, "ab") as file:
        file.write(text)


def shorten_log(path: Path) -> None:
    """Empty a log that has grown too long, under the hands of its monitor."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            os.truncate(path, 0)


def tails(files: MachineFiles) -> str:
    """The end of what the monitor and the guest wrote, fit for a terminal."""
    context = []
    for path in (files.vmm_log, files.console):
        with contextlib.suppress(OSError):
            text = _shown(tail(path))
            if text:
                context.append(f"{path.name}: {text}")
    return "\n".join(context)


def tail(path: Path) -> bytes:
    """The last 2000 bytes of a file; raises OSError."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        return file.read(_TAIL_BYTES)


def _shown(data: bytes) -> str:
    text = data.decode("utf-8", "replace").strip()
    return "".join(each if each.isprintable() or each == "\n" else " " for each in text)
