"""The files of /etc that name the machine.

A root file system may hold anything in their places, or no /etc: what cannot be written is left.
Files are written only when they change, and in place where that is possible: each page written
costs at the next pause.
"""

from __future__ import annotations

import os
import stat

from .errors import AgentError
from .loop import Loop
from .upload import AtomicFile
from .users import User

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_ADDRESS = b"127.0.1.1"
_MARK = b"# this machine, kept by Wrenn"
_LOCALHOST = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_BLOCK = 512
"""Bytes in the unit of `st_blocks`."""
_LIMIT = 1024 * 1024
"""Bytes of /etc/hosts that are worth reading."""


class Etc:
    """The directory `path`, whose files are written as `root`."""

    def __init__(self, loop: Loop, path: str, root: User) -> None:
        self._loop = loop
        self._path = path
        self._root = root
        self._named: object = None
        """The last name, and how the files looked that say it."""

    async def set_hostname(self, name: str) -> None:
        """Make `hostname` and `hosts` say that the machine has this name."""
        stamps = self._stamps()
        if stamps and self._named == (name, stamps):
            return
        encoded = name.encode()
        await self._update("hostname", lambda _: encoded + b"\n")
        await self._update("hosts", lambda old: with_own_line(old, encoded))
        self._named = name, self._stamps()

    async def set_machine_id(self, machine_id: str) -> bool:
        """Make `machine-id` say this; whether it does."""
        return await self._update("machine-id", lambda _: machine_id.encode() + b"\n", 0o444)

    def _stamps(self) -> list[tuple[int, int, int]]:
        """How the files look, nothing where one is not there."""
        stamps = []
        for name in ("hostname", "hosts"):
            try:
                info = os.stat(os.path.join(self._path, name))
            except OSError:
                return []
            stamps.append((info.st_ino, info.st_mtime_ns, info.st_size))
        return stamps

    async def _update(
        self, name: str, change: Callable[[bytes], bytes], mode: int | None = None
    ) -> bool:
        return await update(self._loop, self._root, os.path.join(self._path, name), change, mode)


async def update(
    loop: Loop, owner: User, path: str, change: Callable[[bytes], bytes], mode: int | None
) -> bool:
    """Change what a file holds, or make it with this owner and mode; whether that was done."""
    try:
        old = read(path)
        new = change(old or b"")
        if new != old and not _overwrite(path, new):
            kept = mode if old is None else None
            with AtomicFile(loop, path, owner, kept) as file:
                file.write(new)
                await file.commit({})
    except (OSError, AgentError):
        return False
    return True


def read(path: str) -> bytes | None:
    """What the file holds, None without one; raises OSError for what is no ordinary file."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(info.st_mode) or info.st_size > _LIMIT:
        raise OSError(f"{path} is left alone")
    with open(path, "rb") as file:
        return file.read(_LIMIT)


def _overwrite(path: str, content: bytes) -> bool:
    """Write over a plain file that is there; whether that was done.

    A file that takes another's place is written to the disk at once (ext4, `auto_da_alloc`). One
    that is written over is not, and costs a pause its memory page alone. Only what has the blocks
    already is written over: on a full disk it would be left half written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or len(content) > info.st_blocks * _BLOCK:
            return False
        if os.pwrite(fd, content, 0) != len(content):
            return False
        if info.st_size > len(content):  # to the same size costs ext4 a transaction
            os.ftruncate(fd, len(content))
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def with_own_line(hosts: bytes, name: bytes) -> bytes:
    """`hosts` with one line of ours for `name`, or none where another line names it already."""
    lines = hosts.splitlines(keepends=True)
    others = [line for line in lines if not line.rstrip().endswith(_MARK)]
    place = next((n for n, line in enumerate(lines) if line not in others), len(others))
    if not any(line.strip() for line in others):
        others, place = _LOCALHOST.splitlines(keepends=True), 2
    wanted = name.lower()
    if any(wanted in line.partition(b"#")[0].lower().split()[1:] for line in others):
        return b"".join(others)
    if others and place == len(others) and not others[-1].endswith(b"\n"):
        others[-1] += b"\n"
    others.insert(place, b"%b\t%b\t%b\n" % (_ADDRESS, name, _MARK))
    return b"".join(others)
