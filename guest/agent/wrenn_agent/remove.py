"""Removing whole trees without keeping everything else waiting."""

from __future__ import annotations

import os
import stat

from .loop import Loop
from .users import ActingAs, User

_REMOVED_PER_BREATH = 100


async def remove_tree(loop: Loop, user: User, path: str) -> None:
    """Remove a file or a directory with its content; symlinks are not followed; raises OSError."""
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
