"""What a machine's process may do, as the kernel tells it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.identity import Identity
from wrenn_sandbox.host.privileged.jail import apart
from wrenn_sandbox.host.privileged.limits import Limits
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.spawn import kvm_groups, spawn_in_slot, start
from wrenn_sandbox.host.privileged.tap import open_tap
from wrenn_sandbox.host.slot import Slot

SLOT = Slot(index=40_000, netns=None, host_ip="127.0.0.1", uid=760_123, tap=None, host_port=40_000)


KEYS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
KEYCTL, ADD_KEY, JOIN, SEARCH, SESSION = *NUMBERS, 1, 10, -3


def found() -> int:
    return libc.syscall(KEYCTL, SEARCH, SESSION, b"user", b"wrenn-test", 0)
"""
KEYS = KEYS.replace("NUMBERS", str((250, 248) if os.uname().machine == "x86_64" else (219, 217)))
HOLDER = (
    KEYS
    + """
import asyncio, subprocess, sys
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.privileged.spawn import spawn_in_slot

assert libc.syscall(KEYCTL, JOIN, None) > 0
assert libc.syscall(ADD_KEY, b"user", b"wrenn-test", b"secret", 6, SESSION) > 0


async def main() -> None:
    slot = Slot(index=1, netns=None, host_ip="127.0.0.1", uid=760_123, tap=None, host_port=1)
    argv = ["/usr/bin/python3", "-I", "-c", sys.argv[1]]
    child = await spawn_in_slot(slot, argv, output=sys.stdout.fileno())
    await child.wait()
    child.close()

print(found() > 0, flush=True)
asyncio.run(main())
"""
)


RICH = """
import sys
from wrenn_sandbox.host.privileged.identity import Identity
from wrenn_sandbox.host.privileged.jail import apart
from wrenn_sandbox.host.privileged.spawn import start

argv, output = ["cat", "/proc/self/status"], sys.stdout.fileno()
apart(lambda: start(argv, identity=Identity(760_123), output=output)).wait()
"""


LIMITED = """
from pathlib import Path
from wrenn_sandbox.host.privileged.identity import Identity
from wrenn_sandbox.host.privileged.jail import apart
from wrenn_sandbox.host.privileged.limits import Limits
from wrenn_sandbox.host.privileged.spawn import start

limits = Limits(file_size=5, address_space=1 << 30, threads=7)
child = apart(lambda: start(["sleep", "60"], identity=Identity(760_123), limits=limits))
print(Path(f"/proc/{child.pid}/limits").read_text())
child.kill()
child.wait()
"""


def status_of(text: str) -> dict[str, list[str]]:
    """What /proc/PID/status says, by its names."""
    return {name: value.split() for name, value in (x.split(":", 1) for x in text.splitlines())}


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def output_of(argv: list[str], directory: Path) -> str:
    """What the process prints once started as the user of SLOT."""
    log = directory / "log"
    with log.open("wb") as file:
        identity = Identity(SLOT.uid, groups=(761_000,))
        child = apart(lambda: start(argv, identity=identity, output=file, cwd=directory))
        status = child.wait()
    text = log.read_text()
    assert status == 0, text
    return text


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "machine"
    place.mkdir()
    os.chown(place, SLOT.uid, SLOT.uid)
    for parent in place.parents[:4]:
        if parent.owner() == "root" and parent != Path("/tmp"):
            parent.chmod(0o755)
    return place


def test_the_process_has_no_privileges(directory: Path) -> None:
    status = status_of(output_of(["cat", "/proc/self/status"], directory))
    assert status["Uid"] == [str(SLOT.uid)] * 4
    assert status["Gid"] == [str(SLOT.uid)] * 4
    assert status["Groups"] == ["761000"]
    assert status["NoNewPrivs"] == ["1"]
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind][0], 16) == 0


def test_nothing_of_what_the_server_has_is_handed_on() -> None:
    gifts = ("--groups=761002", "--inh-caps=+net_admin", "--ambient-caps=+net_admin")
    argv = ["setpriv", *gifts, sys.executable, "-c", RICH]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status = status_of(done.stdout)
    assert status["Groups"] == []
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind][0], 16) == 0


async def test_the_process_is_bounded_and_the_first_to_go(tmp_path: Path) -> None:
    """Its id gets into its group, and out of memory the kernel prefers it to the server."""
    members = tmp_path / "cgroup.procs"
    with members.open("wb") as group:
        process = await spawn_in_slot(SLOT, ["sleep", "60"], group=group.fileno())
    try:
        assert members.read_text() == str(process.pid)
        assert oom_score(process.pid) > oom_score(os.getpid())
    finally:
        await process.kill()
        process.close()


def test_the_process_gets_no_environment_of_the_server(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRENN_SECRET", "secret")
    minimal = "PATH=/usr/sbin:/usr/bin:/sbin:/bin\nLC_ALL=C.UTF-8\nMALLOC_ARENA_MAX=1\n"
    assert output_of(["env"], directory) == minimal


def test_what_a_server_without_huge_pages_starts_has_none() -> None:
    given_up = "from wrenn_sandbox.host.privileged.spawn import give_up_huge_pages as give_up\n"
    argv = [sys.executable, "-c", f"{given_up}give_up()\n{RICH}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert status_of(done.stdout)["THP_enabled"] == ["0"]


def test_the_process_leads_a_session_in_its_directory(directory: Path) -> None:
    script = "read a b c d e f rest < /proc/self/stat; echo $$ $f; pwd"
    ids, place = output_of(["bash", "-c", script], directory).splitlines()
    assert len(set(ids.split())) == 1
    assert place == str(directory)


@pytest.mark.parametrize("lack", [[], ["--bounding-set=-sys_resource"]], ids=["root", "container"])
def test_the_process_is_limited(lack: list[str]) -> None:
    argv = ["setpriv", *lack, sys.executable, "-c", LIMITED]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line[:25].strip(): line[26:].split()[:2] for line in done.stdout.splitlines()}
    assert rows["Max core file size"] == ["0", "0"]
    assert rows["Max locked memory"] == ["0", "0"]
    assert rows["Max msgqueue size"] == ["0", "0"]
    assert rows["Max open files"] == ["4096", "4096"]
    assert rows["Max file size"] == ["5", "5"]
    assert rows["Max address space"] == ["1073741824", "1073741824"]
    assert rows["Max processes"] == ["7", "7"]


def test_limits_are_no_higher_than_the_servers_own() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        Limits(files=1 << 60).apply(child.pid)
        ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (ceiling, ceiling)
        for each in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_NPROC):
            assert resource.prlimit(child.pid, each) == resource.getrlimit(each)
    finally:
        child.kill()
        child.wait()


def test_a_process_that_cannot_be_limited_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def refuse(_: Limits, pid: int) -> None:
        started.append(pid)
        raise PermissionError(1, "no limits today")

    monkeypatch.setattr(Limits, "apply", refuse)
    with pytest.raises(HostFailure, match="cannot be bounded") as caught:
        apart(lambda: start(["sleep", "60"], identity=Identity(SLOT.uid)))
    assert "no limits today" in str(caught.value.detail)
    assert not Path(f"/proc/{started[0]}").exists()


async def test_only_passed_descriptors_arrive(namespaces: NamespaceThread) -> None:
    given, kept = os.pipe()
    other = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(other, True)
    output, result = os.pipe()
    try:
        argv = ["bash", "-c", f"cd /proc/self/fd; echo *; cat <&{given}"]
        process = await spawn_in_slot(SLOT, argv, pass_fds=[given], output=result, cwd=Path("/"))
        os.write(kept, b"through the pipe")
        os.close(kept)
        assert await process.wait() == 0
        process.close()
        listed, text = os.read(output, 1000).decode().split("\n")
        assert set(listed.split()) - {"3", "255"} <= {"0", "1", "2", str(given)}
        assert str(given) in listed.split()
        assert text == "through the pipe"
    finally:
        for each in (given, other, output, result):
            os.close(each)


def test_a_program_that_is_missing() -> None:
    with pytest.raises(HostFailure, match="cannot be started"):
        apart(lambda: start(["/no/such/program"], identity=Identity(SLOT.uid)))


def test_the_server_stays_who_it_is(directory: Path) -> None:
    own = Path("/proc/self/status")
    before = status_of(own.read_text())
    output_of(["true"], directory)
    after = status_of(own.read_text())
    for name in ("Uid", "Gid", "Groups", "NoNewPrivs", "CapInh", "CapPrm", "CapEff", "CapBnd"):
        assert after[name] == before[name], name


def test_a_user_that_a_thread_is_cannot_trace_the_server() -> None:
    """While the thread is that user: afterwards it is root's process anyway."""
    script = """
import subprocess, threading
from wrenn_sandbox.host.privileged.identity import Identity, become
from wrenn_sandbox.host.privileged.jail import apart

became, seen = threading.Event(), threading.Event()


def inside():
    become(Identity(760_123))
    threads.append(threading.get_native_id())
    became.set()
    seen.wait()


threads = []
other = threading.Thread(target=lambda: apart(inside))
other.start()
became.wait()
for name in ("environ", "maps", "mem"):
    argv = ["setpriv", "--reuid=760123", "--regid=760123", "--clear-groups", "--", "head", "-c1"]
    done = subprocess.run([*argv, f"/proc/{threads[0]}/{name}"], capture_output=True, text=True)
    print(done.stderr.rsplit(": ", 1)[-1], end="")
seen.set()
other.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "Permission denied\n" * 3


async def test_a_directory_that_is_missing(namespaces: NamespaceThread) -> None:
    with pytest.raises(HostFailure) as caught:
        await spawn_in_slot(SLOT, ["true"], cwd=Path("/no/such/place"))
    assert "/no/such" not in str(caught.value)
    assert "/no/such" in (caught.value.detail or "")


async def test_a_slot_that_is_gone(namespaces: NamespaceThread) -> None:
    slot = Slot(index=1, netns="wrenn-gone00-1", host_ip="", uid=SLOT.uid)
    with pytest.raises(HostFailure, match="gone"):
        await spawn_in_slot(slot, ["true"])
    with pytest.raises(HostFailure, match="gone"):
        await open_tap(namespaces, slot)
    with pytest.raises(HostFailure, match="no tap"):
        await open_tap(namespaces, SLOT)


async def test_the_thread_comes_back_from_a_namespace(namespaces: NamespaceThread) -> None:
    def current() -> int:
        return os.stat("/proc/thread-self/ns/net").st_ino

    name = f"wtest-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)  # noqa: ASYNC221
    try:
        inside = await namespaces.run(name, current)
        assert inside == os.stat(f"/run/netns/{name}").st_ino
        with pytest.raises(ZeroDivisionError):
            await namespaces.run(name, lambda: 1 // 0)
        assert await namespaces.run(None, current) == current() != inside
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)  # noqa: ASYNC221


def test_the_group_of_the_kvm_device(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    assert kvm_groups(device) == ()
    device.touch()
    os.chown(device, 0, 761_001)
    device.chmod(0o660)
    assert kvm_groups(device) == (761_001,)
    device.chmod(0o600)
    assert kvm_groups(device) == ()


def test_the_keys_that_a_server_holds_are_not_handed_on() -> None:
    argv = [sys.executable, "-c", HOLDER, KEYS + "print(found() > 0)"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr
