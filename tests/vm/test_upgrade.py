"""QEMU is replaced by another one: what is stored goes on with the one that stored it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.other_qemu import other_qemu, path_with
from support.vm.rig import Api, NewRig, Rig, eventually
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host import failpoints

pytestmark = pytest.mark.vm

_PREPARE = (
    "echo precious > /root/kept; sync; setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo $!"
)
_COLLECTED_SEC = 10.0


def _engines(rig: Rig) -> set[str]:
    return {each.name for each in (rig.data_dir / "engines").iterdir()}


def _engine_of(rig: Rig, sandbox: str) -> str:
    """The engine that a running sandbox's machine was started with."""
    [record] = [each for each in rig.journals() if each.sandbox_id == sandbox]
    arguments = Path(f"/proc/{rig.machine_of(sandbox)}/cmdline").read_bytes()
    assert arguments.startswith(bytes(rig.data_dir / "engines" / record.engine / "loader"))
    return record.engine


def _is_alive(api: Api, sandbox: str, process: str) -> bool:
    return api.output(sandbox, f"tr '\\0' ' ' < /proc/{process}/cmdline") == "sleep 4321"


def _upgrade(rig: Rig, programs: Path) -> None:
    """As after an update of the package, under a server that is restarted then."""
    rig.server.kill()
    rig.server.set(PATH=path_with(programs))
    rig.server.start()


def _wrenn(rig: Rig, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "wrenn_sandbox", *arguments],
        env={"PATH": "/usr/bin:/bin", "WRENN_DATA_DIR": str(rig.data_dir)},
        capture_output=True,
        check=False,
        text=True,
    )
    return done.stdout + done.stderr


def _events(api: Api, sandbox: str) -> list[tuple[str, str]]:
    found = api.request("GET", f"/v1/sandboxes/{sandbox}/events").json()
    return [(each["event"], each.get("reason", "")) for each in reversed(found)]


def test_stored_sandboxes_outlive_an_upgrade_of_qemu(new_rig: NewRig, tmp_path: Path) -> None:
    rig, api = new_rig()
    stored, running = api.create().id, api.create().id
    processes = {each: api.output(each, _PREPARE) for each in (stored, running)}
    api.pause(stored)
    [old] = _engines(rig)
    _upgrade(rig, other_qemu(tmp_path))
    [new] = _engines(rig) - {old}
    assert _is_alive(api, running, processes[running])
    api.pause(running)
    for sandbox, process in processes.items():
        for _ in range(2):
            api.resume(sandbox)
            assert _engine_of(rig, sandbox) == old
            assert _is_alive(api, sandbox, process)
            api.pause(sandbox)
    api.resume(stored)
    fresh = api.create().id
    assert _engine_of(rig, fresh) == new
    api.delete(running)
    assert _engines(rig) == {old, new}
    api.delete(stored)
    assert eventually(lambda: _engines(rig) == {new}, _COLLECTED_SEC)
    assert api.output(fresh, "echo here") == "here"


def test_what_a_retired_qemu_stored_is_rebooted(new_rig: NewRig, tmp_path: Path) -> None:
    rig, api = new_rig()
    sandbox, source, running = (api.create().id for _ in range(3))
    for each in (sandbox, source, running):
        api.output(each, _PREPARE)
    api.pause(sandbox)
    api.snapshot(source, "old")
    [old] = _engines(rig)
    assert "New images are made with" in _wrenn(rig, "engine", "retire", old)
    _upgrade(rig, other_qemu(tmp_path))
    said = _wrenn(rig, "engine", "retire", old[:12])
    assert "stored sandboxes that are rebooted when they are resumed: 1" in said
    assert "VMs that run on it until they are paused or deleted: 1" in said
    assert [each.name for each in (rig.data_dir / "engines" / old).iterdir()] == ["manifest.json"]
    assert api.output(running, "cat /root/kept") == "precious"
    api.pause(running)
    for each in (sandbox, running):
        api.resume(each)
        event, reason = _events(api, each)[-1]
        assert event == "resumed"
        assert reason.startswith("rebooted: QEMU ")
        assert "was retired by the operator of this host" in reason
        assert api.output(each, "cat /root/kept") == "precious"
        assert api.exec(each, "pgrep", "-x", "sleep").exit_code == 1
        assert _engine_of(rig, each) != old
    process = api.output(sandbox, _PREPARE)
    api.pause(sandbox)
    api.resume(sandbox)
    assert _is_alive(api, sandbox, process)
    assert _events(api, sandbox)[-1] == ("resumed", "")
    created = api.create(template="old").id
    assert api.output(created, "cat /root/kept") == "precious"
    event, reason = _events(api, created)[-1]
    assert event == "started"
    assert "was retired by the operator of this host" in reason
    [listed] = [
        x for x in json.loads(_wrenn(rig, "engine", "list", "--json")) if x["digest"] == old
    ]
    assert (listed["state"], listed["sandboxes"], listed["snapshots"]) == ("retired", 0, 1)
    assert api.request("DELETE", "/v1/snapshots/old").status_code == 204
    assert api.output(created, "cat /root/kept") == "precious"
    assert eventually(lambda: old not in _engines(rig), _COLLECTED_SEC)


def test_what_a_server_of_before_stored_goes_on(new_rig: NewRig, tmp_path: Path) -> None:
    """It names the version of its QEMU and no engine."""
    rig, api = new_rig()
    sandbox = api.create().id
    process = api.output(sandbox, _PREPARE)
    api.pause(sandbox)
    rig.server.stop()
    [manifest] = rig.stored_of(sandbox)
    images = (rig.data_dir / "images").glob("*/manifest.json")
    for path in (manifest, *images):
        content = json.loads(path.read_bytes())
        if content.get("machine") is not None:
            del content["machine"]["engine"]
            path.unlink()
            path.write_text(json.dumps(content))
    _upgrade(rig, other_qemu(tmp_path))
    for _ in range(2):
        api.resume(sandbox)
        assert _is_alive(api, sandbox, process)
        api.pause(sandbox)


@pytest.mark.parametrize("point", failpoints.ENGINE)
def test_a_server_killed_while_it_keeps_another_qemu(
    new_rig: NewRig, tmp_path: Path, point: str
) -> None:
    rig, api = new_rig()
    [old] = _engines(rig)
    rig.server.stop()
    rig.server.set(PATH=path_with(other_qemu(tmp_path)), WRENN_FAULT_POINT=point)
    with pytest.raises(HostFailure):
        rig.server.start()
    rig.server.set(WRENN_FAULT_POINT="")
    rig.server.start()
    assert api.request("GET", "/v1/sandboxes").status_code == 200
    [new] = _engines(rig)
    assert new != old
