"""The server is killed at each step of each operation, and started again.

Whatever it was doing: no sandbox is lost but one that was being created, none is in limbo, and
nothing is left when all are deleted.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from support.vm.rig import Api, NewRig, Rig, eventually, rig_of
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_SETTLED_SEC = 20.0


@dataclass
class Victim:
    """A server that dies on demand, and what its data directory holds when nothing is wrong."""

    rig: Rig
    api: Api
    images: set[str]
    fault: Path
    """The file that says where the server dies."""

    def dies(self, point: str, method: str, path: str, body: object = None) -> None:
        """Ask for something of a server that does not survive it, then start another one."""
        self.fault.write_text(point)
        with pytest.raises(httpx2.TransportError):
            self.api.request(method, path, body)
        self.rig.server.kill()
        self.fault.unlink()
        self.rig.server.start()

    def sandboxes(self) -> dict[str, str]:
        """The status of each sandbox of the team that is not stopped."""
        found = self.api.request("GET", "/v1/sandboxes").json()
        return {each["id"]: each["status"] for each in found if each["status"] != "stopped"}

    def outcome(self, sandbox: str) -> str:
        """What the sandbox has become: `running` and `paused` only when they are true."""
        found = refusal = ""

        def settled() -> bool:
            nonlocal found, refusal
            status = self.api.get(sandbox).status
            if status == "running" and self.api.exec_raw(sandbox, "true").status_code == 200:
                found = status
            elif status == "paused":
                answer = self.api.request("POST", f"/v1/sandboxes/{sandbox}/resume")
                found = status if answer.status_code == 200 else ""
                refusal = answer.text
            elif status in ("stopped", "error"):
                found = status
            return bool(found)

        if not eventually(settled, _SETTLED_SEC):
            pytest.fail(f"{self.api.get(sandbox)}\n{refusal}\n{self.rig.server.tail()}")
        return found

    def is_clean(self) -> bool:
        """Whether nothing is there but the templates."""
        return (
            not self.rig.machines()
            and not list((self.rig.data_dir / "run").iterdir())
            and not list((self.rig.data_dir / "paused").iterdir())
            and not list((self.rig.data_dir / "held").iterdir())
            and {each.name for each in (self.rig.data_dir / "images").iterdir()} == self.images
        )


@pytest.fixture(scope="module")
def victim(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    fault = tmp_path_factory.mktemp("fault") / "point"
    overrides = {"WRENN_RECONCILE_INTERVAL_SEC": "60", "WRENN_FAULT_POINT": str(fault)}
    with rig_of(images, overrides) as rig:
        api = Api(rig.server)
        api.delete(api.create().id)
        names = {each.name for each in (rig.data_dir / "images").iterdir()}
        yield Victim(rig, api, names, fault)
        api.close()


@dataclass(frozen=True)
class _Work:
    """A process and a file of a sandbox, to be found again."""

    sandbox: str
    pid: str

    @classmethod
    def begin(cls, api: Api, sandbox: str) -> "_Work":
        api.output(sandbox, "echo precious > /root/file; sync")
        return cls(
            sandbox, api.output(sandbox, "setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo $!")
        )

    def is_there(self, api: Api, sandbox: str = "") -> bool:
        script = f"cat /root/file; tr '\\0' ' ' < /proc/{self.pid}/cmdline || true"
        return api.output(sandbox or self.sandbox, script) == "precious\nsleep 4321"


@pytest.mark.parametrize("point", failpoints.CREATE)
def test_a_create_killed_at_any_step_leaves_nothing_behind(victim: Victim, point: str) -> None:
    before = victim.sandboxes().keys()
    victim.dies(point, "POST", "/v1/sandboxes", {})
    [sandbox] = victim.sandboxes().keys() - before
    assert victim.outcome(sandbox) == "error"
    assert victim.rig.reasons_of(sandbox)[-1]
    assert eventually(victim.is_clean, _SETTLED_SEC)
    victim.api.delete(sandbox)


@pytest.mark.parametrize("point", failpoints.PAUSE)
def test_a_pause_killed_at_any_step_loses_nothing(victim: Victim, point: str) -> None:
    api = victim.api
    sandbox = api.create().id
    work = _Work.begin(api, sandbox)
    victim.dies(point, "POST", f"/v1/sandboxes/{sandbox}/pause")
    kept = point in ("pause.renamed", "pause.committed", "pause.released")
    assert victim.outcome(sandbox) == ("paused" if kept else "running")
    assert work.is_there(api)
    assert api.pause(sandbox).status == "paused"
    assert api.resume(sandbox).status == "running"
    assert work.is_there(api)
    api.delete(sandbox)
    assert eventually(victim.is_clean, _SETTLED_SEC)


@pytest.mark.parametrize("point", failpoints.RESUME)
def test_a_resume_killed_at_any_step_loses_nothing(victim: Victim, point: str) -> None:
    api = victim.api
    sandbox = api.create().id
    work = _Work.begin(api, sandbox)
    api.pause(sandbox)
    victim.dies(point, "POST", f"/v1/sandboxes/{sandbox}/resume")
    resumed = point in ("machine.running", "resume.consumed")
    assert victim.outcome(sandbox) == ("running" if resumed else "paused")
    assert work.is_there(api)
    assert api.pause(sandbox).status == "paused"
    assert api.resume(sandbox).status == "running"
    assert work.is_there(api)
    api.delete(sandbox)
    assert eventually(victim.is_clean, _SETTLED_SEC)


@pytest.mark.parametrize("point", failpoints.REBOOT)
def test_a_reboot_killed_at_any_step_loses_nothing(victim: Victim, point: str) -> None:
    """The sandbox is as it was stored, with its process, or as it is after a boot, without."""
    api = victim.api
    sandbox = api.create().id
    work = _Work.begin(api, sandbox)
    api.pause(sandbox)
    path = f"/v1/sandboxes/{sandbox}/resume"
    victim.dies(point, "POST", path, {"memory": False})
    assert victim.outcome(sandbox) == "paused"
    stored = point in ("pause.renamed", "reboot.committed", "reboot.done")
    assert api.output(sandbox, "cat /root/file") == "precious"
    assert work.is_there(api) != stored
    api.pause(sandbox)
    assert api.request("POST", path, {"memory": False}).status_code == 200
    assert api.output(sandbox, "cat /root/file") == "precious"
    api.delete(sandbox)
    assert eventually(victim.is_clean, _SETTLED_SEC)


@pytest.mark.parametrize("point", failpoints.SNAPSHOT)
def test_a_snapshot_killed_at_any_step_loses_nothing(victim: Victim, point: str) -> None:
    api = victim.api
    sandbox = api.create().id
    work = _Work.begin(api, sandbox)
    victim.dies(point, "POST", "/v1/snapshots", {"sandbox_id": sandbox, "name": "kept"})
    done = victim.outcome(sandbox) == "stopped"
    assert done == (point == "snapshot.released")
    names = [each["name"] for each in api.request("GET", "/v1/snapshots?type=snapshot").json()]
    assert names == (["kept"] if done else [])
    if done:
        clone = api.create(template="kept").id
        assert work.is_there(api, clone)
        api.delete(clone)
        assert api.request("DELETE", "/v1/snapshots/kept").status_code == 204
    else:
        assert work.is_there(api)
    api.delete(sandbox)
    assert eventually(victim.is_clean, _SETTLED_SEC)


@pytest.mark.parametrize("point", failpoints.DESTROY)
@pytest.mark.parametrize("state", ["running", "paused"])
def test_a_delete_killed_at_any_step_is_finished(victim: Victim, point: str, state: str) -> None:
    api = victim.api
    sandbox = api.create().id
    if state == "paused":
        api.pause(sandbox)
    victim.dies(point, "DELETE", f"/v1/sandboxes/{sandbox}")
    assert eventually(lambda: victim.outcome(sandbox) == "stopped", _SETTLED_SEC)
    api.delete(sandbox)
    assert eventually(victim.is_clean, _SETTLED_SEC)


def test_a_machine_that_dies_while_it_is_paused(new_rig: NewRig) -> None:
    """It is paused, with all it had, or gone and said to be: never acknowledged and lost."""
    rig, api = new_rig()
    for _ in range(3):
        sandbox = api.create().id
        work = _Work.begin(api, sandbox)
        machine = rig.machine_of(sandbox)
        staged = rig.data_dir / "paused" / sandbox / "1.new" / "disk"
        with ThreadPoolExecutor(1) as pool:
            pause = pool.submit(api.request, "POST", f"/v1/sandboxes/{sandbox}/pause")
            while not staged.exists() and not pause.done():
                time.sleep(0.0005)
            with contextlib.suppress(ProcessLookupError):
                os.kill(machine, signal.SIGKILL)
            answer = pause.result(timeout=patience(30))
        if answer.status_code == 200:
            assert api.get(sandbox).status == "paused"
            api.resume(sandbox)
            assert work.is_there(api)
        else:
            assert answer.status_code == 502
            assert eventually(lambda each=sandbox: api.get(each).status == "error", 5)  # type: ignore[misc]
        api.delete(sandbox)
    assert rig.run_directories() == set()


def test_an_unknown_point(new_rig: NewRig) -> None:
    rig, _ = new_rig()
    rig.server.stop()
    rig.server.set(WRENN_FAULT_POINT="nowhere")
    with pytest.raises(Exception, match="did not start"):
        rig.server.start()
    rig.server.set(WRENN_FAULT_POINT="")
