"""Making directories, giving what was made to its user, and removing whole trees."""

from __future__ import annotations

import os
import stat

from .loop import Loop
from .users import ActingAs, User

_MODE = 0o755
_REMOVED_PER_BREATH = 100
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def make_directories(path: str, owner: User, mode: int | None = None) -> None:
    """Make what is missing of the absolute `path`, for `owner`; `mode` is that of the last one.

    Each is made inside of the one before, as a descriptor: nobody can put a link in its place.
    Raises OSError; what is there already is left as it is.
    """
    missing: list[str] = []
    while not os.path.lexists(path):
        path, name = os.path.split(path)
        missing.append(name)
    folder = os.open(path, _OPEN)
    try:
        while missing:
            name = missing.pop()
            made = _make(name, folder, owner, _MODE if missing or mode is None else mode)
            os.close(folder)
            folder = made
    finally:
        os.close(folder)


def _make(name: str, folder: int, owner: User, mode: int) -> int:
    try:
        os.mkdir(name, _MODE, dir_fd=folder)
    except FileExistsError:
        return os.open(name, _OPEN, dir_fd=folder)
    made = os.open(name, _OPEN | os.O_NOFOLLOW, dir_fd=folder)
    try:
        give(made, owner, os.fstat(folder).st_mode)
        if mode != _MODE:
            os.fchmod(made, mode | (os.fstat(made).st_mode & stat.S_ISGID))
    except OSError:
        os.close(made)
        raise
    return made


def give(fd: int, owner: User, folder_mode: int) -> None:
    """Make `owner` the owner of what was made in a folder of this mode; raises OSError.

    The group is the folder's where that hands its group on. An agent without root's rights always
    makes things as itself.
    """
    if os.geteuid() == 0 and owner.uid != 0:
        os.fchown(fd, owner.uid, -1 if folder_mode & stat.S_ISGID else owner.gid)


async def remove_tree(loop: Loop, user: User, path: str) -> None:
    """Remove a file or a directory with its content, and let others have their turn meanwhile.

    Symlinks are not followed. Raises OSError.
    """
    pending = [path]
    steps = 0
    while pending:
        steps += 1
        if steps % _REMOVED_PER_BREATH == 0:
            await loop.breathe()
        with ActingAs(user):
            here = pending[-1]
            try:
                if not stat.S_ISDIR(os.lstat(here).st_mode):
                    os.unlink(here)
                elif names := os.listdir(here):
                    pending += [os.path.join(here, name) for name in names]
                    continue
                else:
                    os.rmdir(here)
            except FileNotFoundError:
                if steps == 1:
                    raise
            pending.pop()  # somebody else removed it, or it was removed here
