"""A thread that can work inside network namespaces."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from wrenn_sandbox.errors import HostFailure

from . import mounts

T = TypeVar("T")

NETNS_DIR = Path("/run/netns")


def enter_netns(name: str) -> None:
    """Put the calling thread into a network namespace; raises `HostFailure`."""
    try:
        target = os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostFailure("The network slot is gone", detail=str(error)) from error
    try:
        mounts.enter(target, mounts.NEW_NET)
    except OSError as error:
        raise HostFailure("Cannot enter the network slot", detail=str(error)) from error
    finally:
        os.close(target)


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
        enter_netns(netns)
        try:
            return work()
        finally:
            self._lost = True
            mounts.enter(self._home, mounts.NEW_NET)
            self._lost = False
