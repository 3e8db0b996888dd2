"""Templates made of sandboxes: what they hold, who may use them, and when their files go."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.vm.rig import Api, NewRig, Rig, error_of, eventually, is_alive

pytestmark = pytest.mark.vm

_WORK = (
    "echo kept > /root/file; echo tmp > /tmp/file; sync; "
    "setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo $! > /root/pid"
)
_CHECK = "cat /root/file /tmp/file; tr '\\0' ' ' < /proc/$(cat /root/pid)/cmdline"
_FOUND = "kept\ntmp\nsleep 4321"


def _worked(api: Api, **fields: object) -> str:
    """A new sandbox with a process and files."""
    sandbox = api.create(**fields).id
    api.output(sandbox, _WORK)
    return sandbox


def _delete_template(api: Api, name: str) -> None:
    assert api.request("DELETE", f"/v1/snapshots/{name}").status_code == 204


def test_a_template_of_a_running_sandbox(rig: Rig, api: Api) -> None:
    images = rig.images()
    source = _worked(api)
    machine = rig.machine_of(source)
    api.snapshot(source, "worked")
    assert api.get(source).status == "stopped"
    assert rig.reasons_of(source)[-1] == "snapshotted"
    assert not is_alive(machine)
    assert source not in rig.run_directories()
    assert api.exec_raw(source, "true").status_code == 409
    assert api.templates() == ["worked"]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: api.create(template="worked"), range(2)))
    assert {each.template for each in made} == {"worked"}
    for each in made:
        assert api.output(each.id, _CHECK) == _FOUND
    script = "hostname; cat /etc/machine-id; od -An -tx1 -N16 /dev/urandom"
    first, second = (api.output(each.id, script).splitlines() for each in made)
    assert len(first) == 3
    assert [line for line in first if line in second] == []
    assert len({rig.token_of(each.id) for each in made}) == 2
    for each in made:
        api.delete(each.id)
    _delete_template(api, "worked")
    assert rig.images() == images


def test_size_is_that_of_the_source(api: Api) -> None:
    source = _worked(api, vcpus=2, memory_mb=256)
    api.snapshot(source, "wide")
    made = api.create(template="wide", vcpus=1, memory_mb=512)
    assert (made.vcpus, made.memory_mb) == (2, 256)
    assert api.output(made.id, "nproc") == "2"
    assert api.output(made.id, _CHECK) == _FOUND
    api.delete(made.id)
    _delete_template(api, "wide")


def test_disks_of_all_lives_are_in_the_template(rig: Rig, api: Api) -> None:
    """Also what was written before a pause, before a snapshot and by the template itself."""
    images = rig.images()
    sandbox = api.create().id
    written = []
    for life in range(3):
        script = f"head -c 3M /dev/urandom > /root/life{life}; sha256sum /root/life{life}; sync"
        written.append(api.output(sandbox, script))
        if life == 0:
            api.pause(sandbox)
            api.resume(sandbox)
        else:
            api.snapshot(sandbox, f"life{life}")
            sandbox = api.create(template=f"life{life}").id
    api.output(sandbox, "echo 3 > /proc/sys/vm/drop_caches")
    assert api.output(sandbox, "sha256sum /root/life?").splitlines() == written
    assert api.output(sandbox, "python3 -c 'import ssl; print(1)'") == "1"
    api.pause(sandbox)
    _delete_template(api, "life1")
    _delete_template(api, "life2")
    api.resume(sandbox)
    api.output(sandbox, "echo 3 > /proc/sys/vm/drop_caches")
    assert api.output(sandbox, "sha256sum /root/life?").splitlines() == written
    api.delete(sandbox)
    assert rig.images() == images


@pytest.mark.parametrize("how", ["deleted", "overwritten"])
def test_a_template_goes_under_its_sandboxes(rig: Rig, api: Api, how: str) -> None:
    images = rig.images()
    api.snapshot(_worked(api), "used")
    [image] = rig.images() - images
    running = api.create(template="used").id
    paused = api.create(template="used").id
    api.pause(paused)
    if how == "deleted":
        _delete_template(api, "used")
        answer = api.request("POST", "/v1/sandboxes", {"template": "used"})
        assert answer.status_code == 404
    else:
        other = api.create().id
        body = {"sandbox_id": other, "name": "used"}
        answer = api.request("POST", "/v1/snapshots", body)
        assert (answer.status_code, error_of(answer).code) == (409, "already_exists")
        assert api.get(other).status == "running"
        api.snapshot(other, "used", overwrite=True)
        fresh = api.create(template="used").id
        assert api.exec(fresh, "test", "-e", "/root/file").exit_code == 1
        api.delete(fresh)
        _delete_template(api, "used")
    assert rig.images() - images == {image}
    assert api.output(running, _CHECK) == _FOUND
    api.resume(paused)
    assert api.output(paused, _CHECK) == _FOUND
    api.pause(running)
    api.delete(paused)
    assert rig.images() - images == {image}
    api.resume(running)
    assert api.output(running, _CHECK) == _FOUND
    api.delete(running)
    assert rig.images() == images
    assert eventually(lambda: rig.sealed_images() <= images, within=30)


def test_snapshots_of_another_team_are_not_found(rig: Rig, api: Api) -> None:
    api.snapshot(_worked(api), "secret")
    stranger = Api(rig.server)
    try:
        assert stranger.templates() == []
        assert stranger.request("DELETE", "/v1/snapshots/secret").status_code == 404
        answer = stranger.request("POST", "/v1/sandboxes", {"template": "secret"})
        assert (answer.status_code, error_of(answer).code) == (404, "not_found")
        own = stranger.create().id
        stranger.snapshot(own, "secret", overwrite=True)
        assert stranger.templates() == ["secret"]
        theirs = api.create(template="secret").id
        answer = stranger.request("POST", "/v1/snapshots", {"sandbox_id": theirs, "name": "x"})
        assert answer.status_code == 404
        assert api.output(theirs, _CHECK) == _FOUND
        api.delete(theirs)
        _delete_template(stranger, "secret")
    finally:
        stranger.close()
    assert api.templates() == ["secret"]
    _delete_template(api, "secret")


def test_a_failed_snapshot_leaves_its_vm_running(new_rig: NewRig) -> None:
    """The sandbox runs on and the old template of the name is as it was."""
    rig, api = new_rig()
    api.snapshot(_worked(api), "good")
    images = rig.images()
    sandbox = _worked(api)
    [kernel] = (rig.data_dir / "images").glob("*/kernel")
    kernel.rename(hidden := rig.data_dir / "kernel")
    held = set((rig.data_dir / "held").iterdir())
    for _ in range(2):
        body = {"sandbox_id": sandbox, "name": "good"}
        answer = api.request("POST", "/v1/snapshots?overwrite=true", body)
        assert (answer.status_code, error_of(answer).code) == (502, "agent_error")
        assert str(rig.data_dir) not in answer.text
        assert api.get(sandbox).status == "running"
        assert api.output(sandbox, _CHECK) == _FOUND
        assert rig.images() == images
        assert set((rig.data_dir / "held").iterdir()) == held
    hidden.rename(kernel)
    clone = api.create(template="good").id
    assert api.output(clone, _CHECK) == _FOUND
    api.snapshot(sandbox, "good", overwrite=True)
    assert len(rig.images()) == len(images) + 1
    assert api.output(clone, _CHECK) == _FOUND
    api.delete(clone)
    assert len(rig.images()) == len(images)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def _paused(rig: Rig, api: Api) -> tuple[str, Path]:
    """A sandbox that was paused, and the directory of what it stored."""
    sandbox = _worked(api)
    api.pause(sandbox)
    [manifest] = rig.stored_of(sandbox)
    return sandbox, manifest.parent


def _refused(rig: Rig, api: Api, sandbox: str) -> str:
    """What a resume says that must fail before any guest runs.

    The server would not survive it if the checks let the resume pass.
    """
    answer = api.request("POST", f"/v1/sandboxes/{sandbox}/resume")
    assert (answer.status_code, error_of(answer).code) == (502, "agent_error")
    assert str(rig.data_dir) not in answer.text
    assert api.get(sandbox).status == "paused"
    assert rig.machines() == set()
    return error_of(answer).message


def test_damaged_files_are_refused_and_told(new_rig: NewRig) -> None:
    rig, api = new_rig(WRENN_FAULT_POINT="resume.consumed")
    sandbox, directory = _paused(rig, api)
    damages: list[tuple[str, Callable[[Path], None]]] = [
        ("vmstate", _flip),
        ("memory.diff", _flip),
        ("memory.idx", _flip),
        ("disk", _flip),
        ("disk", _cut),
        ("memory.diff", _cut),
        ("memory.diff", Path.unlink),
    ]
    for name, damage in damages:
        shutil.copy2(directory / name, directory.parent / "kept")
        damage(directory / name)
        message = _refused(rig, api, sandbox)
        assert "damaged" in message
        assert name in message
        (directory.parent / "kept").rename(directory / name)
    rig.server.stop()
    rig.server.set(WRENN_FAULT_POINT="")
    rig.server.start()
    api.resume(sandbox)
    assert api.output(sandbox, _CHECK) == _FOUND


def test_machines_that_do_not_fit(new_rig: NewRig) -> None:
    """As after an upgrade or on another machine; the server reads manifests when it starts."""
    rig, api = new_rig(WRENN_FAULT_POINT="resume.checked")
    sandbox, directory = _paused(rig, api)
    path = directory / "manifest.json"
    good = path.read_bytes()
    changes: list[tuple[dict[str, str], str]] = [
        ({"engine": "0" * 64}, "engine that has stored it"),
        ({"engine": "", "vmm_version": "1.2.3"}, "version of the machine monitor (1.2.3"),
        ({"cpu_model": "486"}, "CPU model (486"),
        ({"accelerator": "abacus"}, "accelerator (abacus"),
        ({}, "damaged"),
    ]
    for change, said in changes:
        rig.server.stop()
        manifest = json.loads(good)
        manifest["machine"] |= change
        path.write_bytes(json.dumps(manifest).encode() if change else good[: len(good) // 2])
        rig.server.start()
        assert said in _refused(rig, api, sandbox)
    rig.server.stop()
    rig.server.set(WRENN_FAULT_POINT="")
    path.write_bytes(good)
    rig.server.start()
    api.resume(sandbox)
    assert api.output(sandbox, _CHECK) == _FOUND
    api.delete(sandbox)
    assert eventually(lambda: not list((rig.data_dir / "paused").iterdir()), 5)
