"""Taps and processes of a real slot."""

import fcntl
import os

import pytest

from support.network.pools import PoolFactory
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.spawn import spawn_in_slot
from wrenn_sandbox.host.privileged.tap import open_tap


async def test_the_process_is_in_the_slot_and_holds_its_tap(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    pool = make_pool(size=0)
    await pool.start()
    slot = await pool.acquire()
    tap = await open_tap(namespaces, slot)
    try:
        assert fcntl.fcntl(tap, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        with pytest.raises(HostFailure, match="attach"):
            await open_tap(namespaces, slot)
        process = await spawn_in_slot(slot, ["sleep", "1000"], pass_fds=[tap])
    finally:
        os.close(tap)
    inside = os.stat(f"/proc/{process.pid}/ns/net").st_ino
    assert inside == os.stat(f"/run/netns/{slot.netns}").st_ino
    assert os.readlink(f"/proc/{process.pid}/fd/{tap}") == "/dev/net/tun"
    await process.kill()
    process.close()
    os.close(await open_tap(namespaces, slot))
