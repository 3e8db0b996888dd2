"""A thread that can work inside network namespaces."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from wrenn_sandbox.errors import HostFailure

T = TypeVar("T")

NETNS_DIR = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class NamespaceThread:
    """One thread of its own; each call enters a namespace, works there and comes back.

    Sockets and processes made inside stay in that namespace. Work is done one piece at a time.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._home: int | None = None
        self._lost = False

    def run_sync(self, netns: str | None, work: Callable[[], T]) -> T:
        """The result of `work` done inside; blocks. Without `netns`, done where we are."""
        return self._executor.submit(self._inside, netns, work).result()

    async def run(self, netns: str | None, work: Callable[[], T]) -> T:
        """As `run_sync`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._inside, netns, work)

    def close(self) -> None:
        """End the thread when its work is done."""
        self._executor.shutdown(wait=True)
        if self._home is not None:
            os.close(self._home)
            self._home = None

    def _inside(self, netns: str | None, work: Callable[[], T]) -> T:
        if self._lost:
            raise HostFailure("The server lost its own network namespace: restart it")
        if netns is None:
            return work()
        if self._home is None:
            self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            target = os.open(NETNS_DIR / netns, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostFailure("The network slot is gone", detail=str(error)) from error
        try:
            _setns(target)
        except OSError as error:
            raise HostFailure("Cannot enter the network slot", detail=str(error)) from error
        finally:
            os.close(target)
        try:
            return work()
        finally:
            self._lost = True
            _setns(self._home)
            self._lost = False
