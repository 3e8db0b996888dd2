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
            if not stat.S_ISDIR(os.lstat(pending[-1]).st_mode):
                os.unlink(pending.pop())
                continue
            names = os.listdir(pending[-1])
            if names:
                pending += [os.path.join(pending[-1], name) for name in names]
            else:
                os.rmdir(pending.pop())
