"""The jail on this machine, and what becomes of it where the kernel refuses."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.memory import pages
from wrenn_sandbox.host.privileged.cgroups import CONTROLLERS
from wrenn_sandbox.host.privileged.confinement import Confinement, confinement, jail_obstacle
from wrenn_sandbox.host.privileged.jail import Jail, View, apart
from wrenn_sandbox.host.privileged.spawn import spawn_in_slot
from wrenn_sandbox.host.slot import Slot

SLOT = Slot(index=40_001, netns=None, host_ip="127.0.0.1", uid=760_124, tap=None, host_port=40_001)
TRIAL = ("true",)
USERFAULT = Path("/dev/userfaultfd")
MAPPING = f"""
import mmap, signal, sys
with open(sys.argv[1], "rb") as file:
    area = mmap.mmap(
        file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )
area[3 * {pages.PAGE}:3 * {pages.PAGE} + 4] = b"mine"
area[4 * {pages.PAGE}] = 1
print("changed", flush=True)
signal.pause()
"""
STAYING = """
import sys
from pathlib import Path
score = Path("/proc/self/oom_score_adj")
while score.read_text().strip() == sys.argv[1]:
    pass
try:
    score.write_text(sys.argv[1])
except OSError:
    pass
print(score.read_text())
"""
READS_ALL = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""For a checkout below a directory of root's own."""
KINDS = ("mnt", "pid", "ipc", "uts")
SHARING = """
from pathlib import Path
from wrenn_sandbox.host.privileged.jail import Jail

before = Path("/proc/self/mountinfo").read_text()
jail = Jail.make(Path("/tmp"))
print(Path("/proc/self/mountinfo").read_text() == before)
jail.close()
"""
LACKING = f"""
import json
from pathlib import Path
from wrenn_sandbox.host.privileged.confinement import confinement, jail_obstacle
found = confinement(Path("/tmp"), {TRIAL!r})
print(json.dumps([found.jail is None, found.lacks, jail_obstacle({TRIAL!r})]))
"""


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jail]:
    jail = Jail.make(tmp_path)
    yield jail
    jail.close()
    jail.close()


async def output_of(jail: Jail, view: View, *argv: str, directory: Path) -> str:
    """What a program prints inside."""
    log = directory / "log"
    with log.open("wb") as file:
        process = await spawn_in_slot(SLOT, argv, jail=jail, view=view, output=file, cwd=view.own)
    status = await process.wait()
    process.close()
    text = log.read_text()
    assert status == 0, text
    return text


async def test_a_view_shows_its_files_under_their_names(jail: Jail, tmp_path: Path) -> None:
    own, shared, other = (tmp_path / name for name in ("run/own", "images/a/disk", "images/b"))
    own.mkdir(parents=True)
    (own / "log").write_text("mine")
    shared.parent.mkdir(parents=True)
    shared.write_text("shared")
    other.mkdir()
    view = View(own, (shared, shared, own / "log"))
    text = await output_of(jail, view, "find", str(tmp_path), "-type", "f", directory=tmp_path)
    assert set(text.splitlines()) == {str(shared), str(own / "log")}
    text = await output_of(jail, view, "cat", str(shared), directory=tmp_path)
    assert text == "shared"


async def test_programs_run_where_they_are_and_cannot_be_changed(
    jail: Jail, tmp_path: Path
) -> None:
    programs, other = tmp_path / "engines" / "one", tmp_path / "engines" / "two"
    for each in (programs, other):
        each.mkdir(parents=True)
        shutil.copy2("/bin/ls", each / "program")
    (programs / "program").chmod(0o777)
    view = View(programs=programs)
    text = await output_of(
        jail, view, str(programs / "program"), str(programs.parent), directory=tmp_path
    )
    assert text == "one\n"
    script = f"! echo >> {programs}/program && ! touch {programs}/new"
    text = await output_of(jail, view, "sh", "-c", script, directory=tmp_path)
    assert text.count("Read-only file system") == 2


async def test_every_mount_inside_is_harmless(jail: Jail, tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir()
    shared.touch()
    argv = ("cat", "/proc/self/mountinfo")
    text = await output_of(jail, View(own, (shared,)), *argv, directory=tmp_path)
    options = {line.split()[4]: line.split()[5].split(",") for line in text.splitlines()}
    system = ("/usr", "/lib", "/bin", "/sbin")
    assert options.keys() >= {"/usr", "/dev/null", "/proc", *map(str, (tmp_path, own, shared))}
    for place, flags in options.items():
        assert "nosuid" in flags, place
        assert "nodev" in flags or place.startswith("/dev/"), place
        assert "noexec" in flags or place.startswith(system), place
        assert "ro" in flags or place in (str(own), "/proc") or place.startswith("/dev/"), place


def test_not_even_root_writes_inside(jail: Jail, tmp_path: Path) -> None:
    def attempt() -> None:
        jail.enter(View())
        for place in ("/", "/usr", "/dev", str(tmp_path)):
            with pytest.raises(OSError, match="Read-only"):
                os.mkdir(f"{place}/new")

    apart(attempt)


async def test_nothing_else_of_this_machine_is_seen(jail: Jail, tmp_path: Path) -> None:
    script = (
        "uname -n; for kind in mnt pid ipc uts; do readlink /proc/self/ns/$kind; done; ls /proc"
    )
    text = await output_of(jail, View(), "bash", "-c", f"{script} | cat", directory=tmp_path)
    name, *rest = text.split()
    assert name == "machine"
    spaces, seen = rest[:4], {each for each in rest[4:] if not each.isdigit()}
    assert not set(spaces) & {os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}
    assert seen == {"self", "thread-self"}
    assert len(rest) - 4 - len(seen) <= 3, "its shell and what that has started"


def test_what_is_mounted_for_it_is_not_mounted_for_others() -> None:
    """Also where namespaces share their mounts, as they do unless a machine is told not to."""
    argv = ["unshare", "--mount", "--propagation", "shared", sys.executable, "-c", SHARING]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


async def test_what_comes_later_is_seen_in_the_own_directory_alone(
    jail: Jail, tmp_path: Path
) -> None:
    own, before = tmp_path / "own", tmp_path / "before"
    own.mkdir()
    before.mkdir()
    script = "read go < own/pipe; cat own/later; ls"
    os.mkfifo(own / "pipe", 0o666)
    (own / "pipe").chmod(0o666)
    log = tmp_path / "log"
    with log.open("wb") as file:
        argv = ["bash", "-c", f"cd {tmp_path}; {script}"]
        process = await spawn_in_slot(SLOT, argv, jail=jail, view=View(own), output=file)
    (own / "later").write_text("later\n")
    (tmp_path / "unseen").touch()
    (own / "pipe").write_text("go\n")
    assert await process.wait() == 0
    process.close()
    assert log.read_text().split() == ["later", "own"]


async def test_the_host_finds_what_a_process_inside_has_mapped(jail: Jail, tmp_path: Path) -> None:
    own, memory = tmp_path / "own", tmp_path / "images" / "memory"
    own.mkdir()
    memory.parent.mkdir()
    memory.write_bytes(bytes(64 * pages.PAGE))
    argv = ["/usr/bin/python3", "-I", "-c", MAPPING, str(memory)]
    given, kept = os.pipe()
    try:
        process = await spawn_in_slot(
            SLOT, argv, jail=jail, view=View(own, (memory,)), pass_fds=[kept], output=kept
        )
        assert await asyncio.to_thread(os.read, given, 100) == b"changed\n"
    finally:
        os.close(given)
        os.close(kept)
    found = pages.find_mapping(process.pid, str(memory), memory.stat().st_size)
    assert pages.own_pages(found) == [pages.Run(3, 2)]
    content = bytearray(2 * pages.PAGE)
    pages.read(found, [pages.Run(3, 2)], memoryview(content))
    assert content[:4] == b"mine"
    await process.kill()
    process.close()


async def test_a_process_stays_the_first_to_go_when_memory_is_short(
    jail: Jail, tmp_path: Path
) -> None:
    """Also where the server may not say that for good, for want of `CAP_SYS_RESOURCE`."""
    argv = ("/usr/bin/python3", "-I", "-c", STAYING, own_score())
    text = await output_of(jail, View(), *argv, directory=tmp_path)
    assert int(text) > int(own_score())


def own_score() -> str:
    return Path("/proc/self/oom_score_adj").read_text().strip()


async def test_devices_are_those_that_are_asked_for(tmp_path: Path) -> None:
    jail = Jail.make(tmp_path, devices=[Path("/dev/full")])
    script = "ls /dev; head -c 3 /dev/full | wc -c"
    try:
        text = await output_of(jail, View(), "bash", "-c", script, directory=tmp_path)
    finally:
        jail.close()
    assert text.split() == ["full", "null", "urandom", "zero", "3"]


@pytest.mark.skipif(not USERFAULT.is_char_device(), reason=f"there is no {USERFAULT}")
async def test_a_device_of_root_can_be_opened_to_all(tmp_path: Path) -> None:
    """A userfaultfd that also answers the kernel's own faults, as KVM makes them."""
    jail = Jail.make(tmp_path, devices=[Path("/dev/full")], opened=[USERFAULT])
    script = """
import fcntl, os
uffd = fcntl.ioctl(os.open("/dev/userfaultfd", os.O_RDWR), 0xAA00, os.O_CLOEXEC)
print(os.getuid(), os.readlink(f"/proc/self/fd/{uffd}"), *sorted(os.listdir("/dev")))
print(os.path.exists("/nodes"))
"""
    try:
        text = await output_of(
            jail, View(), "/usr/bin/python3", "-I", "-c", script, directory=tmp_path
        )
    finally:
        jail.close()
    names = "full null urandom userfaultfd zero"
    assert text.splitlines() == [f"{SLOT.uid} anon_inode:[userfaultfd] {names}", "False"]


async def test_a_file_that_is_missing(jail: Jail, tmp_path: Path) -> None:
    view = View(tmp_path, (tmp_path.parent / "missing",))
    with pytest.raises(HostFailure, match="confined") as caught:
        await spawn_in_slot(SLOT, ["true"], jail=jail, view=view)
    assert "missing" not in str(caught.value)
    assert "missing" in (caught.value.detail or "")


def traces() -> tuple[object, ...]:
    """What this process has open, is in and sees mounted, but for the slots of others."""
    names = ("mnt", "pid", "pid_for_children", "net", "ipc", "uts")
    inside = [os.readlink(f"/proc/thread-self/ns/{name}") for name in names]
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounted = [line for line in lines if "/run/netns" not in line]
    return len(os.listdir("/proc/self/fd")), inside, mounted, os.getcwd()


async def test_nothing_stays_behind(jail: Jail, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o711)
    before = traces()
    for _ in range(3):
        await output_of(jail, View(tmp_path), "true", directory=tmp_path)
        with pytest.raises(HostFailure):
            await spawn_in_slot(SLOT, ["true"], jail=jail, view=View(tmp_path / "missing"))
    Jail.make(tmp_path).close()
    assert traces() == before


def test_a_thread_of_its_own_tells_how_it_ended() -> None:
    assert apart(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)


def test_this_machine_has_a_jail(tmp_path: Path) -> None:
    assert jail_obstacle(TRIAL) == ""
    found = confinement(tmp_path, TRIAL)
    assert found.jail is not None
    assert set(found.lacks) <= {f"cgroup {each}" for each in CONTROLLERS}
    found.close()
    Confinement().close()


def test_a_program_that_does_not_run_inside_is_an_obstacle(tmp_path: Path) -> None:
    assert "status 1" in jail_obstacle(("false",))
    program = tmp_path / "program"
    program.symlink_to("/bin/true")
    assert "No such file" in jail_obstacle((str(program),))
    found = confinement(tmp_path, (str(program),))
    assert found.jail is None
    assert any(each.startswith("jail: ") for each in found.lacks)
    found.close()


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        (("--bounding-set=-sys_admin", "--inh-caps=-sys_admin"), "Operation not permitted"),
        (("--reuid=760125", "--clear-groups", *READS_ALL), "root"),
    ],
)
def test_without_the_right_to_mount_there_is_no_jail_and_no_failure(
    lack: tuple[str, ...], words: str
) -> None:
    argv = ["setpriv", *lack, sys.executable, "-c", LACKING]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    without, lacks, obstacle = json.loads(done.stdout)
    assert without
    assert words in lacks[0]
    assert words in obstacle
