"""A monitor that its guest has taken over: what the process could do to this host and to others.

A program of ours runs as the process of a machine that exists, started exactly as QEMU is, though
without the system call filter that QEMU gives itself. Beside it are the running, stored and
snapshotted sandboxes of another team. Then the real monitors are looked at, at each turn of a
sandbox's life.
"""

import asyncio
import contextlib
import inspect
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest

from support.vm import captured
from support.vm.rig import Api, NewRig, Rig, eventually
from support.vm.stand import spec_of
from wrenn_sandbox.host.memory.base_image import SealedMemories
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.confinement import confinement
from wrenn_sandbox.host.vmm.base import MachineSpec
from wrenn_sandbox.host.vmm.launch import launch
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_PYTHON = "/usr/bin/python3"
_REFUSED = {"EPERM", "EACCES", "EROFS"}
_KINDS = ("mnt", "pid", "ipc", "uts", "net")
_THREADS = 300


class Findings(msgspec.Struct):
    """What `captured.py` reports; an outcome is the name of an error, or begins with `done`."""

    status: dict[str, str]
    environment: dict[str, str]
    host_name: str
    root: list[str]
    etc: list[str]
    dev: list[str]
    proc: list[str]
    mounted: dict[str, str]
    visible: list[str]
    overwritten: dict[str, str]
    sealed: str
    opened: dict[str, str]
    connected: dict[str, str]
    signalled: dict[str, str]
    traced: dict[str, str]
    privileges: dict[str, str]
    limits: dict[str, str]


@dataclass(frozen=True)
class Scene:
    """The captured machine, what it is made of, and the others."""

    rig: Rig
    spec: MachineSpec
    layers: tuple[Path, ...]
    secrets: tuple[Path, ...]
    sockets: tuple[Path, ...]
    pids: tuple[int, ...]
    twin: int
    """The real monitor of the captured machine, whose user is the same."""

    @property
    def readable(self) -> set[Path]:
        spec = self.spec
        return {spec.runtime, *spec.disks, *self.besides}

    @property
    def besides(self) -> tuple[Path, ...]:
        """What the driver adds; The image's memory is there as a file for QEMU from 8.2 on."""
        assert self.spec.memory is not None
        return (*self.layers, self.spec.memory)


@pytest.fixture(scope="module")
def scene(rig: Rig, api: Api) -> Iterator[Scene]:
    with contextlib.closing(Api(rig.server)) as others:
        own = api.create().id
        api.pause(own)
        api.resume(own)
        running, paused, kept = (others.create().id for _ in range(3))
        others.pause(paused)
        before = rig.images()
        others.snapshot(kept, "theirs")
        [snapshot] = rig.images() - before
        spec, layers = spec_of(rig, own)
        victim, _ = spec_of(rig, running)
        paths = Paths(rig.data_dir)
        stored = next((paths.paused / paused).iterdir())
        yield Scene(
            rig,
            spec,
            layers,
            secrets=(
                *(each for each in victim.files.directory.iterdir() if not each.is_socket()),
                *stored.iterdir(),
                *(paths.images / snapshot).iterdir(),
                spec.files.journal,
                paths.data_dir / "wrenn.db",
                Path("/etc/passwd"),
                Path("/etc/shadow"),
                Path("/proc/version"),
                Path("/sys/kernel/vmcoreinfo"),
            ),
            sockets=(victim.files.control_socket, spec.files.control_socket),
            pids=(rig.server.pid, rig.machine_of(running), os.getpid()),
            twin=rig.machine_of(own),
        )
        others.request("DELETE", "/v1/snapshots/theirs")


@pytest.fixture(scope="module")
def findings(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What a program finds that runs as the monitor of the captured machine."""
    output = tmp_path_factory.mktemp("captured") / "output"
    memories = SealedMemories()
    with contextlib.ExitStack() as stack:
        stack.callback(memories.close)
        assert scene.spec.memory is not None
        memory = memories.get(scene.spec.memory)
        stack.callback(os.close, memory)
        listener = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        wanted = {
            "data_dir": str(scene.rig.data_dir),
            "overwrite": [str(each) for each in scene.readable],
            "memory": memory,
            "open": [str(each) for each in scene.secrets],
            "connect": [*map(str, scene.sockets), *addresses(scene, listener)],
            "pids": [str(each) for each in (*scene.pids, scene.twin)],
            "own_disk": str(scene.spec.files.overlay),
            "threads": _THREADS,
        }
        status = asyncio.run(run(scene, wanted, memory, output))
    text = output.read_text()
    assert status == 0, text
    return msgspec.json.decode(text.encode(), type=Findings)


def addresses(scene: Scene, listener: socket.socket) -> list[str]:
    """Where the host and its server would answer."""
    port = listener.getsockname()[1]
    near = IPv4Address(scene.spec.slot.host_ip) - 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        outer = probe.getsockname()[0]
    server = scene.rig.server.url.removeprefix("http://")
    return [server, f"127.0.0.1:{port}", f"{near}:{port}", f"{outer}:{port}"]


async def run(scene: Scene, wanted: dict[str, object], memory: int, output: Path) -> int | None:
    """Start the program as the driver starts QEMU; its status when it has ended."""
    confined = confinement(scene.rig.data_dir, [_PYTHON, "--version"])
    assert confined.jail is not None
    argv = [_PYTHON, "-I", "-c", inspect.getsource(captured), json.dumps(wanted)]
    try:
        with output.open("wb") as file:
            process = await launch(
                confined, scene.spec, argv, readable=scene.besides, pass_fds=[memory], output=file
            )
        async with asyncio.timeout(patience(30)):
            return await process.wait()
    finally:
        confined.close()


def test_a_captured_vmm_is_nobody(scene: Scene, findings: Findings) -> None:
    uid = str(scene.spec.slot.uid)
    status = findings.status
    assert status["Uid"].split() == status["Gid"].split() == [uid] * 4
    assert status["Groups"].split() == []
    assert status["NoNewPrivs"] == "1"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0
    assert findings.environment.keys() <= {"PATH", "LC_ALL", "LC_CTYPE", "MALLOC_ARENA_MAX"}
    assert findings.host_name != socket.gethostname()


def test_a_captured_vmm_sees_harmless_programs_and_devices_only(findings: Findings) -> None:
    top = Path(findings.visible[0]).parts[1]
    system = {"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr"}
    assert set(findings.root) - system == {"dev", "etc", "proc", top}
    assert findings.etc == ["ld.so.cache"]
    assert findings.dev == ["null", "urandom", "zero"]


def test_every_mount_is_harmless(scene: Scene, findings: Findings) -> None:
    own = str(scene.spec.files.directory)
    for place, text in findings.mounted.items():
        options = text.split(",")
        assert "nosuid" in options, place
        assert "nodev" in options or place.startswith("/dev/"), place
        assert "noexec" in options or place.startswith(("/usr", "/lib", "/bin", "/sbin")), place
        assert "ro" in options or place in (own, "/proc") or place.startswith("/dev/"), place


def test_a_captured_vmm_sees_the_files_of_its_own_vm_alone(
    scene: Scene, findings: Findings
) -> None:
    expected = {*scene.readable, scene.spec.files.directory}
    assert len(scene.layers) == 1
    assert {Path(each) for each in findings.visible} == expected


def test_a_captured_vmm_cannot_write_to_what_others_use(scene: Scene, findings: Findings) -> None:
    assert findings.overwritten == {str(each): "" for each in scene.readable}
    assert findings.sealed == ""


def test_a_captured_vmm_cannot_read_what_is_others(findings: Findings) -> None:
    assert len(findings.opened) > 15
    assert set(findings.opened.values()) <= {"ENOENT", "EACCES"}, findings.opened
    assert findings.opened["/etc/shadow"] == findings.opened["/proc/version"] == "ENOENT"


def test_a_captured_vmm_cannot_connect_to_anybody(scene: Scene, findings: Findings) -> None:
    theirs, own = scene.sockets
    assert findings.connected[str(theirs)] == "ENOENT"
    assert findings.connected[str(own)] == "EACCES"
    assert len(findings.connected) == 6
    assert not [each for each in findings.connected.values() if each.startswith("done")]


def test_a_captured_vmm_cannot_signal_or_trace_others(scene: Scene, findings: Findings) -> None:
    seen = {int(each) for each in findings.proc if each not in ("self", "thread-self")}
    itself = int(findings.status["Pid"])
    assert seen == {itself, scene.twin}
    nobody = {str(each): "ESRCH" for each in (*scene.pids, scene.twin)}
    assert findings.signalled == nobody
    assert findings.traced == nobody


def test_a_captured_vmm_gets_no_privileges(findings: Findings) -> None:
    assert {what: each for what, each in findings.privileges.items() if each not in _REFUSED} == {}


def test_a_captured_vmm_is_bounded(findings: Findings) -> None:
    assert findings.limits == {
        "file": "EFBIG",
        "memory": "ENOMEM",
        "locked": "EPERM",
        "threads": "RuntimeError",
    }


def require_confined(rig: Rig, sandbox: str) -> None:
    """The real monitor of a sandbox is where and what it should be."""
    spec, layers = spec_of(rig, sandbox)
    pid = rig.machine_of(sandbox)
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert status["Uid"].split() == status["Gid"].split() == [str(spec.slot.uid)] * 4
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NSpid"].split() == [str(pid), "1"]
    own_score = int(Path("/proc/self/oom_score_adj").read_text())
    assert int((process / "oom_score_adj").read_text()) > own_score
    for kind in _KINDS:
        assert os.readlink(process / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
    peak, bound = int(status["VmPeak"].split()[0]) << 10, limit_of(process, "Max address space")
    assert (spec.memory_mb << 20) < peak < bound
    assert limit_of(process, "Max processes") == 256
    assert limit_of(process, "Max file size") > spec.disk_mb << 20
    found = {
        Path("/") / each.relative_to(process / "root")
        for each in (process / "root" / rig.data_dir.relative_to("/")).rglob("*")
        if not each.is_dir()
    }
    own = {each for each in found if each.is_relative_to(spec.files.directory)}
    assert spec.files.overlay in own
    memory = {spec.memory} & found
    engine = {
        each for each in (rig.data_dir / "engines" / spec.engine).rglob("*") if not each.is_dir()
    }
    assert spec.engine
    assert found - own - memory == {spec.runtime, *spec.disks, *layers} | engine
    writable = opened_for_writing(process)
    assert identity(spec.files.overlay) in writable
    assert not writable & {identity(each) for each in found - own}


def identity(path: Path) -> tuple[int, int]:
    """Device and inode of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def opened_for_writing(process: Path) -> set[tuple[int, int]]:
    """The files that a process could write to by a descriptor."""
    found = set()
    for each in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            flags = (process / "fdinfo" / each.name).read_text().split("flags:", 1)[1].split()[0]
            if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                found.add(identity(each))
    return found


def limit_of(process: Path, name: str) -> int:
    [line] = [
        line
        for line in (process / "limits").read_text().splitlines()
        if line.startswith(f"{name} ")
    ]
    return int(line[26:].split()[1])


def require_lacks_logged(rig: Rig) -> None:
    """The server has said what this machine cannot give, and nothing where it can all."""
    confined = confinement(rig.data_dir, ["true"])
    confined.close()
    lines = [line for line in rig.server.log.read_text().splitlines() if "less protected" in line]
    assert len(lines) == bool(confined.lacks)
    assert all(each in lines[0] for each in confined.lacks)


def test_real_monitors_are_confined_all_their_lives(new_rig: NewRig) -> None:
    rig, api = new_rig()
    require_lacks_logged(rig)
    sandbox = api.create().id
    require_confined(rig, sandbox)
    api.pause(sandbox)
    api.resume(sandbox)
    require_confined(rig, sandbox)
    rig.server.kill()
    rig.server.start()
    assert eventually(lambda: api.exec_raw(sandbox, "true").status_code == 200, 10)
    require_confined(rig, sandbox)
    api.snapshot(sandbox, "kept")
    clone = api.create(template="kept").id
    require_confined(rig, clone)
