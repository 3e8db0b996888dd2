"""Forks of a sandbox and the way back to a snapshot, through the public API."""

import pytest

from support.vm.rig import Api, Rig

pytestmark = pytest.mark.vm

_COUNTER = """
cat > /root/count.py <<'END'
import itertools, os, time
for number in itertools.count():
    with open("/run/count.new", "w") as file:
        file.write(str(number))
    os.rename("/run/count.new", "/run/count")
    time.sleep(0.05)
END
setsid python3 /root/count.py >/dev/null 2>&1 </dev/null &
echo $! > /root/pid
while ! [ -e /run/count ]; do sleep 0.1; done
"""
_COUNTS = """
before=$(cat /run/count)
while [ "$(cat /run/count)" = "$before" ]; do sleep 0.1; done
tr '\\0' ' ' < /proc/$(cat /root/pid)/cmdline; echo; cat /run/count
"""
_SELF = "hostname; cat /etc/machine-id; od -An -tx1 -N16 /dev/urandom"


def _count(api: Api, sandbox: str) -> int:
    """How far the counter is, which is the same process and goes on."""
    command, count = api.output(sandbox, _COUNTS).splitlines()
    assert command.split() == ["python3", "/root/count.py"]
    return int(count)


def test_forks_go_on_and_are_sandboxes_of_their_own(rig: Rig, api: Api) -> None:
    images = rig.images()
    source = api.create()
    api.output(source.id, _COUNTER)
    before = _count(api, source.id)
    answer = api.request("POST", f"/v1/sandboxes/{source.id}/fork", {"count": 2})
    assert answer.status_code == 201, f"{answer.text}\n{rig.server.tail()}"
    forks = [each["sandbox"]["id"] for each in answer.json()]
    everyone = [source.id, *forks]
    assert all(_count(api, each) > before for each in everyone)
    found = [api.output(each, _SELF).splitlines() for each in everyone]
    for number in range(3):
        assert len({lines[number] for lines in found}) == 3, found
    assert len({rig.token_of(each) for each in everyone}) == 3
    assert len({api.get(each).host_ip for each in everyone}) == 3
    api.output(forks[0], "kill $(cat /root/pid)")
    assert _count(api, source.id) > before
    assert _count(api, forks[1]) > before
    for each in everyone:
        api.delete(each)
    assert rig.images() == images


def test_going_back_restores_files_and_processes(rig: Rig, api: Api) -> None:
    sandbox = api.create().id
    api.output(sandbox, _COUNTER)
    api.output(sandbox, "echo kept > /root/file; sync")
    before = _count(api, sandbox)
    path = f"/v1/sandboxes/{sandbox}"
    made = api.request("POST", f"{path}/snapshots", {"name": "good"})
    assert made.status_code == 201, f"{made.text}\n{rig.server.tail()}"
    machine = rig.machine_of(sandbox)
    api.output(sandbox, "kill -9 $(cat /root/pid); echo lost > /root/file; sync")
    rolled = api.request("POST", f"{path}/rollback", {"snapshot": "good"})
    assert rolled.status_code == 200, f"{rolled.text}\n{rig.server.tail()}"
    assert rig.machine_of(sandbox) != machine
    assert api.output(sandbox, "cat /root/file; hostname").splitlines() == ["kept", sandbox]
    assert _count(api, sandbox) > before
    api.pause(sandbox)
    rolled = api.request("POST", f"{path}/rollback", {"snapshot": "good"})
    assert rolled.status_code == 200, f"{rolled.text}\n{rig.server.tail()}"
    assert _count(api, sandbox) > before
    api.delete(sandbox)
    assert api.request("DELETE", "/v1/snapshots/good").status_code == 204
