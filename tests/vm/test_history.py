"""What a real VM used and wrote to its console, over a pause, a crash of the server and its end."""

import time

import pytest

from support.vm.rig import Api, NewRig, eventually

pytestmark = pytest.mark.vm

_WORK = """
import os
held = bytearray(120 << 20)
while not os.path.exists("/root/enough"):
    pass
"""
_SEND = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
    for _ in range(100):
        outside.sendto(bytes(1000), ("192.0.2.1", 9))
"""
"""To a network that is reserved for examples."""
_SENT = 100_000
_GROWN = 80 << 20
_BUSIER = 3
"""Per cent of a processor, of which a busy host may give the VM little."""


def _samples(api: Api, sandbox: str) -> list[dict[str, float]]:
    start = int(time.time()) - 1800
    answer = api.request("GET", f"/v1/sandboxes/{sandbox}/metrics?start={start}")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, float]] = answer.json()["samples"]
    return found


def _sent(api: Api, sandbox: str) -> float:
    return _samples(api, sandbox)[-1]["net_sent"]


def _texts(api: Api, sandbox: str) -> list[str]:
    answer = api.request("GET", f"/v1/sandboxes/{sandbox}/logs?direction=backward&limit=1000")
    assert answer.status_code == 200, answer.text
    return [each["text"] for each in answer.json()["lines"]]


def test_history_outlives_pause_crash_and_end(new_rig: NewRig) -> None:
    rig, api = new_rig()
    sandbox = api.create().id
    assert eventually(lambda: bool(_samples(api, sandbox)), 30)
    [first, *_] = _samples(api, sandbox)
    assert 300 << 20 < first["mem_total"] < 512 << 20
    assert 0 < first["mem_used"] < first["mem_total"]
    assert 0 < first["disk_used"] < first["disk_total"]

    api.output(sandbox, "echo 'before the pause' > /dev/console")
    assert eventually(lambda: "before the pause" in _texts(api, sandbox), 20)
    api.exec_raw(sandbox, "python3", "-c", _WORK, background=True)

    def worked() -> bool:
        return any(
            each["cpu_used_pct"] > first["cpu_used_pct"] + _BUSIER
            and each["mem_used"] > first["mem_used"] + _GROWN
            for each in _samples(api, sandbox)
            if each["mem_used"] is not None
        )

    # a guest that did not answer in time is asked again a minute later
    assert eventually(worked, 120)
    counted = first["net_sent"] is not None
    api.exec(sandbox, "python3", "-c", _SEND)
    assert eventually(lambda: not counted or _sent(api, sandbox) >= _SENT, 30)
    api.output(sandbox, "touch /root/enough")
    # what the server has not read by then is in the VMM
    api.output(sandbox, "echo 'the last words' > /dev/console")
    api.pause(sandbox)
    before = _samples(api, sandbox)
    assert "the last words" in _texts(api, sandbox)
    api.resume(sandbox)
    rig.server.kill()
    rig.server.start()
    assert eventually(lambda: len(_samples(api, sandbox)) > len(before), 30)
    api.exec(sandbox, "python3", "-c", _SEND)
    assert eventually(lambda: not counted or _sent(api, sandbox) >= 2 * _SENT, 30)
    api.output(sandbox, "echo 'after the crash' > /dev/console")
    assert eventually(lambda: "after the crash" in _texts(api, sandbox), 20)
    after = _samples(api, sandbox)
    assert after[: len(before)] == before
    api.delete(sandbox)
    assert _samples(api, sandbox)[: len(after)] == after
    assert {"before the pause", "the last words", "after the crash"} <= set(_texts(api, sandbox))
    day = api.request("GET", "/v1/usage/history").json()["days"][-1]
    assert day["running_sec"] > 20
