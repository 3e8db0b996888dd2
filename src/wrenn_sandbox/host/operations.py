"""What each operation on a sandbox needs: an end once begun, failures in the platform's words."""

import asyncio
import contextlib
import errno
from collections.abc import Coroutine, Iterator
from typing import Final, TypeVar

from wrenn_sandbox.errors import HostFailure, NoCapacity

T = TypeVar("T")

NO_SPACE: Final = "The host has no disk space left for another sandbox."


async def to_the_end(work: Coroutine[None, None, T]) -> T:
    """The result of work that, once begun, is carried through even if its task is cancelled."""
    task = asyncio.ensure_future(work)
    while True:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
            current = asyncio.current_task()
            assert current is not None
            current.uncancel()


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Failures of files and disks as `NoCapacity` and `HostFailure`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoCapacity(NO_SPACE, detail=str(error)) from error
        raise HostFailure("The host could not do that.", detail=str(error)) from error
