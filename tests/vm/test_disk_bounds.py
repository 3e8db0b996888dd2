"""How fast a guest may use its disk, and what becomes of it when the host's disk is full."""

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from support.vm.rig import Api, NewRig, eventually
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_MB = 4
_OPERATIONS = 100
_BYTES = 24 << 20


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
    """How much slower than without bounds is measured by `./dev bench disk`."""
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
        assert bounded[0] > _MB / 2 * 0.6, (life, bounded)
        assert bounded[1] > _OPERATIONS / 50 * 0.6, (life, bounded)
    began = time.monotonic()
    api.exec(sandbox, "sh", "-c", "dd if=/dev/zero of=/root/more bs=1M count=1000 oflag=direct &")
    api.pause(sandbox)
    assert time.monotonic() - began < patience(10), (
        "what waits for its turn does not hold up a pause"
    )


def test_a_guest_that_finds_the_disk_full_goes_on_when_there_is_room(new_rig: NewRig) -> None:
    """And has written every byte."""
    rig, api = new_rig()
    api.delete(api.create().id)
    small = rig.data_dir / "run"
    _mount(small, "size=12m,mode=711")
    try:
        sandbox = api.create().id
        script = (
            f"yes wrenn | head -c {_BYTES} > /root/big; sync; echo 3 > /proc/sys/vm/drop_caches"
        )
        fields = {"cmd": "sh", "args": ["-c", f"{script}; sha256sum /root/big > /root/sum"]}
        answer = api.request(
            "POST", f"/v1/sandboxes/{sandbox}/exec", {**fields, "background": True}
        )
        assert answer.status_code == 202, answer.text
        assert eventually(lambda: _free(small) < 1 << 20, within=30)
        rig.server.kill()
        rig.server.start()
        assert api.get(sandbox).status == "running", "it is no lost machine"
        _mount(small, "remount,size=256m")
        assert eventually(lambda: _free(small) < (256 << 20) - _BYTES, within=30)
        wanted = hashlib.sha256((b"wrenn\n" * (_BYTES // 6 + 1))[:_BYTES]).hexdigest()
        script = "until test -s /root/sum; do sleep 0.1; done; cat /root/sum"
        assert api.output(sandbox, script).split() == [wanted, "/root/big"]
        api.delete(sandbox)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def _mount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)


def _free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
