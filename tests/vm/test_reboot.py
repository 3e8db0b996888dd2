"""Guests that do not respond or have stopped, and what their owners get back of them."""

import json
import time

import httpx2
import pytest

from support.vm.rig import Api, NewRig, Rig, error_of, eventually
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_WITHOUT = {"memory": False}
_WAY_OUT = "wrenn sandbox resume --reboot"
_PREPARE = (
    "echo precious > /root/kept; sync; setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo $!"
)
_DEAF = "setsid sh -c 'sleep 0.3; ip link set eth0 down' >/dev/null 2>&1 </dev/null &"
"""Nothing that is sent to the guest arrives any more; all else in it goes on."""


def _prepared(api: Api, **fields: object) -> str:
    """A sandbox with a file on its disk and a process."""
    sandbox = api.create(**fields).id
    api.output(sandbox, _PREPARE)
    return sandbox


def _resume(api: Api, sandbox: str, body: object = None) -> httpx2.Response:
    return api.request("POST", f"/v1/sandboxes/{sandbox}/resume", body)


def _reboot(api: Api, sandbox: str) -> None:
    began = time.monotonic()
    answer = _resume(api, sandbox, _WITHOUT)
    assert (answer.status_code, answer.json().get("status")) == (200, "running"), answer.text
    print(f"rebooted in {time.monotonic() - began:.1f} s")
    assert api.output(sandbox, "cat /root/kept") == "precious"
    assert api.exec(sandbox, "pgrep", "-x", "sleep").exit_code == 1


def _events(api: Api, sandbox: str) -> list[tuple[str, str]]:
    found = api.request("GET", f"/v1/sandboxes/{sandbox}/events").json()
    return [(each["event"], each.get("reason", "")) for each in reversed(found)]


def _is_deaf(api: Api, sandbox: str) -> bool:
    return api.request("GET", f"/v1/sandboxes/{sandbox}/metrics").status_code == 502


def _gauge(rig: Rig, api: Api) -> float:
    text = api.request("GET", "/metrics").text
    [line] = [each for each in text.splitlines() if each.startswith("wrenn_sandboxes_not_resp")]
    return float(line.split()[-1])


def test_a_deaf_guest_gives_its_files_back(new_rig: NewRig) -> None:
    rig, api = new_rig()
    sandbox = _prepared(api, vcpus=2, memory_mb=256)
    boot = api.output(sandbox, "cat /proc/sys/kernel/random/boot_id")
    api.output(sandbox, _DEAF)
    assert eventually(lambda: _is_deaf(api, sandbox), within=20)
    for method, path, body in (
        ("GET", "metrics", None),
        ("POST", "exec", {"cmd": "true"}),
        ("POST", "files/list", {"path": "/root"}),
        ("POST", "files/read", {"path": "/root/kept"}),
    ):
        began = time.monotonic()
        answer = api.request(method, f"/v1/sandboxes/{sandbox}/{path}", body)
        assert answer.status_code == 502, answer.text
        assert "not responding since" in error_of(answer).message
        assert _WAY_OUT in error_of(answer).message
        assert time.monotonic() - began < patience(15)
    event, reason = _events(api, sandbox)[-1]
    assert event == "not_responding"
    assert reason.startswith("guest not responding since ")
    assert _gauge(rig, api) == 1
    assert api.pause(sandbox).status == "paused"
    rig.server.stop()
    rig.server.set(WRENN_BOOT_TIMEOUT_SEC="1")
    rig.server.start()
    answer = _resume(api, sandbox)
    assert (answer.status_code, error_of(answer).code) == (502, "agent_error")
    assert "did not answer in time" in error_of(answer).message
    assert _WAY_OUT in error_of(answer).message
    assert api.get(sandbox).status == "paused"
    rig.server.stop()
    rig.server.set(WRENN_BOOT_TIMEOUT_SEC="60")
    rig.server.start()
    _reboot(api, sandbox)
    assert _events(api, sandbox)[-1][1].startswith("rebooted")
    assert api.output(sandbox, "cat /proc/sys/kernel/random/boot_id") != boot
    assert api.output(sandbox, "nproc") == "2"
    assert api.output(sandbox, "hostname") == sandbox
    assert 150 < int(api.output(sandbox, "awk '/MemTotal/ {print $2}' /proc/meminfo")) / 1024 < 256
    assert _gauge(rig, api) == 0
    api.output(sandbox, "echo more >> /root/kept")
    process = api.output(sandbox, "setsid sleep 1234 >/dev/null 2>&1 </dev/null & echo $!")
    for _ in range(2):
        api.pause(sandbox)
        api.resume(sandbox)
    assert api.output(sandbox, "cat /root/kept") == "precious\nmore"
    assert api.output(sandbox, f"tr '\\0' ' ' < /proc/{process}/cmdline") == "sleep 1234"
    api.delete(sandbox)
    assert rig.machines() == set()


def test_a_guest_in_a_vm_that_responds_again_is_noticed(api: Api) -> None:
    sandbox = api.create().id
    api.output(
        sandbox,
        "setsid sh -c 'sleep 0.3; ip link set eth0 down;"
        f" sleep {patience(14)}; ip link set eth0 up;"
        " ip route add default via 169.254.0.22; ip neigh replace 169.254.0.22 lladdr"
        " 02:00:00:00:00:02 dev eth0' >/dev/null 2>&1 </dev/null &",
    )
    assert eventually(lambda: _is_deaf(api, sandbox), within=20)
    assert eventually(lambda: _events(api, sandbox)[-1][0] == "responding", within=60)
    assert _events(api, sandbox)[-2][0] == "not_responding"
    assert api.output(sandbox, "echo here") == "here"
    api.delete(sandbox)


def test_a_vm_of_a_snapshot_reboots_over_its_disk(api: Api) -> None:
    source = _prepared(api)
    api.snapshot(source, "rebooted")
    sandbox = api.create(template="rebooted").id
    api.output(sandbox, "echo own > /root/own; sync")
    api.pause(sandbox)
    _reboot(api, sandbox)
    assert api.output(sandbox, "cat /root/own") == "own"
    api.delete(sandbox)
    api.request("DELETE", "/v1/snapshots/rebooted")


@pytest.mark.parametrize("key", ["c", "o", "b"])
def test_a_guest_that_panics_or_shuts_down_keeps_its_disk(rig: Rig, api: Api, key: str) -> None:
    sandbox = _prepared(api)
    api.exec_raw(sandbox, "sh", "-c", f"echo {key} > /proc/sysrq-trigger", timeout_sec=5)
    assert eventually(lambda: api.get(sandbox).status == "paused", within=15)
    assert "the guest stopped" in rig.reasons_of(sandbox)[-1]
    assert sandbox not in rig.run_directories()
    answer = _resume(api, sandbox)
    assert (answer.status_code, error_of(answer).code) == (409, "invalid_state")
    assert _WAY_OUT in error_of(answer).message
    _reboot(api, sandbox)
    api.delete(sandbox)


def test_a_guest_that_shuts_down_while_the_server_is_away(new_rig: NewRig) -> None:
    rig, api = new_rig()
    sandbox = _prepared(api)
    api.output(
        sandbox,
        "setsid sh -c 'sleep 3; echo o > /proc/sysrq-trigger' >/dev/null 2>&1 </dev/null &",
    )
    rig.server.kill()
    time.sleep(6)
    rig.server.start()
    assert eventually(lambda: api.get(sandbox).status == "paused", within=15)
    _reboot(api, sandbox)
    api.delete(sandbox)
    assert rig.machines() == set()


def test_a_file_system_that_is_damaged(api: Api) -> None:
    """It is said, and the memory is there still."""
    sandbox = api.create().id
    process = api.output(sandbox, _PREPARE)
    api.output(sandbox, "dd if=/dev/zero of=/dev/vda bs=1k seek=1 count=1 oflag=direct 2>/dev/null")
    api.pause(sandbox)
    answer = _resume(api, sandbox, _WITHOUT)
    assert (answer.status_code, error_of(answer).code) == (502, "agent_error")
    assert "did not start from its disk" in error_of(answer).message
    assert api.get(sandbox).status == "paused"
    api.resume(sandbox)
    assert api.output(sandbox, f"read name < /proc/{process}/comm; echo $name") == "sleep"
    api.delete(sandbox)


def test_one_that_another_engine_has_stored(new_rig: NewRig) -> None:
    rig, api = new_rig()
    sandbox = _prepared(api)
    api.pause(sandbox)
    rig.server.stop()
    [path] = rig.stored_of(sandbox)
    manifest = json.loads(path.read_bytes())
    machine = {"engine": "0" * 64, "vmm_version": "6.0.0", "cpu_model": "another"}
    manifest["machine"] |= machine | {"accelerator": "kvm"}
    path.write_text(json.dumps(manifest))
    rig.server.start()
    answer = _resume(api, sandbox)
    assert (answer.status_code, error_of(answer).code) == (502, "agent_error")
    assert "engine that has stored it (qemu 6.0.0" in error_of(answer).message
    assert _WAY_OUT in error_of(answer).message
    _reboot(api, sandbox)
    api.delete(sandbox)
