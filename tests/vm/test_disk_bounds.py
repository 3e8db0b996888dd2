"""How fast a guest may use its disk, and how much of the host's disk it can come to take."""

import time

import pytest

from vm.conftest import NewRig
from vm.harness import Api

pytestmark = pytest.mark.vm

_MB = 4
_OPERATIONS = 100


def _seconds(api: Api, sandbox: str, script: str) -> float:
    began = time.monotonic()
    api.output(sandbox, script)
    return time.monotonic() - began


def _write(api: Api, sandbox: str) -> float:
    return _seconds(api, sandbox, f"dd if=/dev/zero of=/root/big bs=1M count={_MB} oflag=direct")


def _operate(api: Api, sandbox: str) -> float:
    script = f"dd if=/dev/zero of=/root/small bs=4k count={_OPERATIONS} oflag=direct"
    return _seconds(api, sandbox, script)


def test_a_guest_uses_its_disk_no_faster_than_it_may(new_rig: NewRig) -> None:
    _, free = new_rig()
    sandbox = free.create().id
    unbounded = (_write(free, sandbox), _operate(free, sandbox))
    free.delete(sandbox)

    rig, api = new_rig(WRENN_DISK_MBPS="2", WRENN_DISK_IOPS="50")
    sandbox = api.create().id
    for life in ("restored", "adopted", "resumed"):
        if life == "adopted":
            rig.server.kill()
            rig.server.start()
        elif life == "resumed":
            api.pause(sandbox)
            api.resume(sandbox)
        bounded = (_write(api, sandbox), _operate(api, sandbox))
        assert bounded[0] > max(_MB / 2 * 0.6, 1.5 * unbounded[0]), (life, bounded, unbounded)
        assert bounded[1] > max(_OPERATIONS / 50 * 0.6, 1.5 * unbounded[1]), (life, bounded)
    began = time.monotonic()
    api.exec(sandbox, "sh", "-c", "dd if=/dev/zero of=/root/more bs=1M count=64 oflag=direct &")
    api.pause(sandbox)
    assert time.monotonic() - began < 10, "what waits for its turn does not hold up a pause"
