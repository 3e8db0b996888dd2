"""What the host does in the background to sandboxes that change a lot or are paused often."""

import os
from pathlib import Path

import msgspec
import pytest

from support.vm.rig import Api, NewRig, Rig, eventually
from wrenn_sandbox.host import paused
from wrenn_sandbox.host.images.manifest import Manifest
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.ids import SandboxId

pytestmark = pytest.mark.vm

_MB = 1 << 20
_KEPT_MB, _CLEARED_MB = 40, 12
_KEEPER = f"""
import os, time, zlib

data = bytearray(os.urandom(1 << 20)) * {_KEPT_MB}
for page in range(0, len(data), 4096):
    data[page : page + 8] = page.to_bytes(8, "big")
scratch = bytearray(b"x") * ({_CLEARED_MB} << 20)

def say():
    with open("/tmp/digest.new", "w") as file:
        print(zlib.crc32(data), scratch.count(0) == len(scratch), file=file)
    os.rename("/tmp/digest.new", "/tmp/digest")

say()
while True:
    if os.path.exists("/tmp/clear"):
        scratch[:] = bytes(len(scratch))
        os.unlink("/tmp/clear")
    if os.path.exists("/tmp/say"):
        say()
        os.unlink("/tmp/say")
    time.sleep(0.05)
"""


def _ask(api: Api, sandbox: str, what: str) -> None:
    api.output(sandbox, f"touch /tmp/{what}; while test -e /tmp/{what}; do sleep 0.05; done")


def _digest(api: Api, sandbox: str) -> list[str]:
    _ask(api, sandbox, "say")
    return api.output(sandbox, "cat /tmp/digest").split()


def _stored(rig: Rig, sandbox: str) -> PausedSandbox:
    found = paused.newest(Paths(rig.data_dir), SandboxId(sandbox))
    assert found is not None
    return found


def _diff_size(rig: Rig, sandbox: str) -> int:
    return _stored(rig, sandbox).files[diff.PAGES].size


def _private_images(rig: Rig) -> list[Manifest]:
    store = ImageStore(Paths(rig.data_dir))
    paths = (rig.data_dir / "images").glob("img-*/manifest.json")
    found = [msgspec.json.decode(path.read_bytes(), type=Manifest) for path in sorted(paths)]
    return [store.open(image.image_id) for image in found if image.private]


def _copies_in_memory(rig: Rig) -> set[str]:
    """The images of which the server keeps a copy in memory."""
    found = set()
    for fd in Path(f"/proc/{rig.server.pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if target.startswith("/memfd:wrenn-"):
            found.add(target.removeprefix("/memfd:wrenn-").removesuffix(" (deleted)"))
    return found


def test_many_changed_pages_become_an_image_of_the_sandbox(new_rig: NewRig) -> None:
    rig, api = new_rig(WRENN_MERGE_DIFF_MB="32")
    sandbox = api.create().id
    api.exec(sandbox, "sh", "-c", 'setsid python3 -c "$0" >/dev/null 2>&1 </dev/null &', _KEEPER)
    api.output(sandbox, "until test -e /tmp/digest; do sleep 0.1; done")
    [digest, _] = _digest(api, sandbox)
    api.pause(sandbox)
    assert eventually(lambda: _diff_size(rig, sandbox) == 0, within=30)
    [image] = _private_images(rig)
    assert _stored(rig, sandbox).image_id == image.image_id
    assert eventually(lambda: len(rig.stored_of(sandbox)) == 1, within=5)

    rig.server.kill()
    rig.server.start()
    api.resume(sandbox)
    assert _digest(api, sandbox) == [digest, "False"]
    _ask(api, sandbox, "clear")
    api.pause(sandbox)
    changed = _diff_size(rig, sandbox)
    assert _CLEARED_MB * _MB <= changed < _KEPT_MB * _MB
    assert eventually(lambda: image.image_id not in _copies_in_memory(rig), within=5)

    api.resume(sandbox)
    assert _digest(api, sandbox) == [digest, "True"], "what was zeroed does not come back"
    api.delete(sandbox)
    assert _private_images(rig) == []
    assert image.image_id not in _copies_in_memory(rig)


def test_disk_layers_of_vms_stay_few(new_rig: NewRig) -> None:
    rig, api = new_rig(WRENN_MAX_DISK_LAYERS="2")
    sandbox = api.create().id
    api.output(sandbox, "mkdir /root/files; cd /root/files; head -c 1M /dev/urandom > doomed; sync")

    def layers() -> tuple[int, ...]:
        [record] = [each for each in rig.journals() if each.sandbox_id == sandbox]
        return record.layers

    def generations() -> set[int]:
        return {int(path.name) for path in (rig.data_dir / "paused" / sandbox).iterdir()}

    for cycle in range(8):
        script = f"cd /root/files; head -c 2M /dev/urandom > {cycle}; sha256sum {cycle} >> sums"
        api.output(sandbox, f"{script}; rm -f doomed; head -c 64k /dev/urandom > same; sync")
        api.pause(sandbox)
        api.resume(sandbox)
        assert eventually(lambda: len(layers()) <= 2, within=10), layers()
        assert eventually(lambda: generations() == set(layers()), within=5)
    api.output(sandbox, "sync; echo 3 > /proc/sys/vm/drop_caches")
    check = "cd /root/files; sha256sum --quiet -c sums; test ! -e doomed; ls | wc -l"
    assert api.output(sandbox, check) == "10"
    assert api.output(sandbox, "dmesg | grep -ciE 'ext4.*error|i/o error' || true") == "0"

    answer = api.request("POST", "/v1/snapshots", {"sandbox_id": sandbox, "name": "tidy"})
    assert answer.status_code == 201, answer.text
    copy = api.create(template="tidy").id
    assert api.output(copy, check) == "10"
    api.delete(copy)
    assert api.request("DELETE", "/v1/snapshots/tidy").status_code == 204
