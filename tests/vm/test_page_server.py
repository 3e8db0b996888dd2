"""A sandbox in Firecracker that has so much stored that a page server serves its memory."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.tiny_guest import BINARY
from support.vm.rig import Api, NewRig, Rig, eventually, is_alive
from wrenn_sandbox.host.vmm.firecracker.driver import SERVED_BYTES

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(not BINARY, reason="WRENN_TEST_FIRECRACKER names no binary"),
]

_KEEPER = f"""
import hashlib, os, signal

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
with open("/tmp/keeper", "w") as file:
    print(os.getpid(), file=file)
data = os.urandom({SERVED_BYTES})
while True:
    with open("/tmp/digest.new", "w") as file:
        file.write(hashlib.sha256(data).hexdigest())
    os.rename("/tmp/digest.new", "/tmp/digest")
    signal.sigwait([signal.SIGUSR1])
"""


def _digest(api: Api, sandbox: str) -> str:
    """What the keeper makes of its memory now."""
    return api.output(
        sandbox,
        "rm -f /tmp/digest; kill -USR1 $(cat /tmp/keeper);"
        " until [ -e /tmp/digest ]; do sleep 0.1; done; cat /tmp/digest",
    )


def _kept(api: Api) -> tuple[str, str]:
    """A sandbox with a keeper and a file, and the keeper's digest."""
    sandbox = api.create().id
    api.output(sandbox, "echo kept > /root/kept; sync")
    script = 'setsid python3 -c "$1" >/tmp/keeper.log 2>&1 </dev/null &'
    assert api.exec(sandbox, "sh", "-c", script, "sh", _KEEPER).exit_code == 0
    wait = "until [ -e /tmp/digest ]; do sleep 0.1; done; cat /tmp/digest"
    return sandbox, api.output(sandbox, wait)


def _page_servers(rig: Rig) -> list[int]:
    """Process ids of those that are known to serve."""
    notes = (rig.data_dir / "run").glob("*/page-server.json")
    return [int(json.loads(each.read_bytes())["pid"]) for each in notes]


def test_a_served_sandbox_outlives_the_server_and_ends_with_its_page_server(
    new_rig: NewRig,
) -> None:
    rig, api = new_rig(WRENN_DRIVER="firecracker")
    sandbox, first = _kept(api)
    api.pause(sandbox)
    api.resume(sandbox)
    machine, [server] = rig.machine_of(sandbox), _page_servers(rig)
    assert _digest(api, sandbox) == first
    rig.server.kill()
    rig.server.start()
    assert (rig.machine_of(sandbox), _page_servers(rig)) == (machine, [server])
    assert _digest(api, sandbox) == first
    api.pause(sandbox)
    assert not is_alive(machine)
    assert not is_alive(server)
    api.resume(sandbox)
    assert _digest(api, sandbox) == first
    machine = rig.machine_of(sandbox)
    (server,) = _page_servers(rig)
    os.kill(server, signal.SIGKILL)
    assert eventually(lambda: not is_alive(machine), within=1)
    assert eventually(lambda: api.get(sandbox).status == "paused", within=15)
    assert "page server" in rig.reasons_of(sandbox)[-1]
    answer = api.request("POST", f"/v1/sandboxes/{sandbox}/resume", {"memory": False})
    assert answer.status_code == 200, answer.text
    assert api.output(sandbox, "cat /root/kept") == "kept"
    api.delete(sandbox)
    assert rig.machines() == set()


def test_a_resume_whose_page_server_is_killed_leaves_the_sandbox_paused(new_rig: NewRig) -> None:
    rig, api = new_rig(WRENN_DRIVER="firecracker")
    sandbox, first = _kept(api)
    api.pause(sandbox)
    for delay in (0.0, 0.02, 0.05):
        with ThreadPoolExecutor(1) as threads:
            resuming = threads.submit(api.request, "POST", f"/v1/sandboxes/{sandbox}/resume")
            assert eventually(lambda: _page_servers(rig) != [], within=60)
            time.sleep(delay)
            (server,) = _page_servers(rig)
            os.kill(server, signal.SIGKILL)
            answer = resuming.result()
        assert answer.status_code == 502, answer.text
        assert api.get(sandbox).status == "paused"
        assert rig.machines() == set()
    api.resume(sandbox)
    assert _digest(api, sandbox) == first
    api.delete(sandbox)
