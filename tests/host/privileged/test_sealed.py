"""Programs that work on a stranger's files: what they see, and what they may."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.jail import Jail, View
from wrenn_sandbox.host.privileged.sealed import in_jail, mounted
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.root

_ALLOWED = {"chown": 0, "dac_override": 1, "fowner": 3, "fsetid": 4}
_ALLOWED |= {"mknod": 27, "setfcap": 31}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("own", "input", "secret"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def jail(place: Path) -> Iterator[Jail]:
    try:
        jail = Jail.make(place)
    except OSError as error:
        pytest.skip(f"there is no jail here: {error}")
    yield jail
    jail.close()


def said(jail: Jail, place: Path, script: str) -> str:
    """What a shell script writes that runs in the jail."""

    def work(before: Sequence[str]) -> str:
        argv = [*before, "sh", "-c", script]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    return in_jail(jail, View(own=place / "own", readable=(place / "input",)), work)


def test_a_program_sees_its_files_and_the_hosts_programs(jail: Jail, place: Path) -> None:
    (place / "input" / "given").write_text("given")
    assert said(jail, place, f"cat {place}/input/given") == "given"
    seen = set(said(jail, place, "ls /").split())
    assert seen >= {"dev", "proc", "usr", place.parts[1]}
    assert not seen & {"home", "root", "run", "sys", "var", "work"} - {place.parts[1]}
    assert said(jail, place, "ls /etc") == "ld.so.cache\n"
    assert said(jail, place, f"ls {place}").split() == ["input", "own"]


def test_a_program_writes_nowhere_but_in_its_directory(jail: Jail, place: Path) -> None:
    script = f"cd {place}; touch own/made; touch input/made made /made /usr/made; echo done"
    assert said(jail, place, script) == "done\n"
    assert [each.name for each in place.rglob("made")] == ["made"]
    assert (place / "own" / "made").exists()
    assert not Path("/usr/made").exists()


def test_a_program_has_no_network_and_of_roots_rights_those_for_files(
    jail: Jail, place: Path
) -> None:
    found = said(jail, place, "id -u; cat /proc/self/net/dev | grep -c :; cat /proc/self/status")
    uid, interfaces, *status = found.splitlines()
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    wanted = sum(1 << number for number in _ALLOWED.values())
    assert (uid, interfaces) == ("0", "1")
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == wanted
    assert fields["NoNewPrivs"] == "1"


def test_a_program_ends_with_the_thread_that_started_it(jail: Jail, place: Path) -> None:
    def work(before: Sequence[str]) -> "subprocess.Popen[bytes]":
        argv = [*before, "sh", "-c", "echo runs; sleep 1000"]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"runs\n"
        return child

    with in_jail(jail, View(own=place / "own"), work) as child:
        assert child.wait(patience(60)) == -9


def test_a_file_system_of_a_file_is_seen_by_the_work_alone(place: Path) -> None:
    image, at = place / "image", place / "own"
    image.touch()
    os.truncate(image, 8 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True)

    def work() -> str:
        (at / "within").write_text("x")
        subprocess.run(["mknod", at / "null", "c", "1", "3"], check=True)
        with pytest.raises(PermissionError):
            (at / "null").read_bytes()
        return next(
            line
            for line in Path("/proc/thread-self/mounts").read_text().splitlines()
            if str(at) in line
        )

    options = mounted(image, at, work).split()[3].split(",")
    assert {"nosuid", "nodev", "noexec"} <= set(options)
    assert list(at.iterdir()) == []
    assert str(at) not in Path("/proc/mounts").read_text()
    with pytest.raises(ZeroDivisionError):
        mounted(image, at, lambda: 1 // 0)


def test_a_file_that_cannot_be_mounted_is_told_of(place: Path) -> None:
    (place / "image").write_bytes(bytes(1 << 20))
    with pytest.raises(HostFailure, match="cannot mount a file system"):
        mounted(place / "image", place / "own", lambda: None)
