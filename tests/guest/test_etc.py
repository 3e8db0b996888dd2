"""The files of /etc that name a machine: kept in agreement, whatever a root file system holds."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Coroutine
from pathlib import Path

import pytest

from wrenn_agent.etc import Etc, with_own_line
from wrenn_agent.loop import Loop
from wrenn_agent.users import User

OURS = b"127.0.1.1\tsb-one\t# this machine, kept by Wrenn\n"
_ROOT = User("root", 0, 0, [], "/root", "/bin/sh")


def finish(coroutine: Coroutine[None, None, object]) -> object:
    """What the coroutine returns; it may wait for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("something else had its turn")


def etc_of(path: Path) -> Etc:
    return Etc(Loop(), str(path), _ROOT)


def name(path: Path, hostname: str) -> None:
    finish(etc_of(path).set_hostname(hostname))


def identify(path: Path, machine_id: str) -> bool:
    return bool(finish(etc_of(path).set_machine_id(machine_id)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"", b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" + OURS),
        (b"127.0.0.1 localhost\n", b"127.0.0.1 localhost\n" + OURS),
        (b"127.0.0.1 localhost", b"127.0.0.1 localhost\n" + OURS),
        (b"1.2.3.4 a # note\n", b"1.2.3.4 a # note\n" + OURS),
        (b"1.2.3.4 a\n" + OURS + b"1.2.3.5 b", b"1.2.3.4 a\n" + OURS + b"1.2.3.5 b"),
        (b"1.2.3.4 a\n" + OURS.replace(b"one", b"old"), b"1.2.3.4 a\n" + OURS),
        (OURS.replace(b"one", b"old") + b"1.2.3.4 a\n", OURS + b"1.2.3.4 a\n"),
        (OURS + b"1.2.3.4 a\n" + OURS, OURS + b"1.2.3.4 a\n"),
        (b"127.0.0.1 x SB-One\n" + OURS, b"127.0.0.1 x SB-One\n"),
        (b"# 127.0.0.1 sb-one\n", b"# 127.0.0.1 sb-one\n" + OURS),
        (b"\xff\xfe 1\r\n", b"\xff\xfe 1\r\n" + OURS),
    ],
)
def test_the_agents_own_line_in_hosts_is_replaced(old: bytes, new: bytes) -> None:
    assert with_own_line(old, b"sb-one") == new
    assert with_own_line(new, b"sb-one") == new


@pytest.mark.root
def test_hosts_and_hostname_follow_the_name(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.0.0.1 db\n")
    (tmp_path / "hosts").chmod(0o664)
    os.chown(tmp_path / "hosts", 0, 1234)
    for hostname in ("template", "sb-one"):
        name(tmp_path, hostname)
        assert (tmp_path / "hostname").read_text() == hostname + "\n"
    assert (tmp_path / "hosts").read_bytes() == b"127.0.0.1 localhost\n10.0.0.1 db\n" + OURS
    info = (tmp_path / "hosts").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_gid) == (0o664, 1234)
    assert stat.S_IMODE((tmp_path / "hostname").stat().st_mode) == 0o644
    assert sorted(os.listdir(tmp_path)) == ["hostname", "hosts"]


def test_nothing_is_written_without_a_change(tmp_path: Path) -> None:
    name(tmp_path, "sb-one")
    identify(tmp_path, "a" * 32)
    files = [tmp_path / each for each in ("hosts", "hostname", "machine-id")]
    before = [(each.stat().st_ino, each.stat().st_mtime_ns) for each in files]
    name(tmp_path, "sb-one")
    identify(tmp_path, "a" * 32)
    assert [(each.stat().st_ino, each.stat().st_mtime_ns) for each in files] == before


def test_a_root_without_etc_gets_one(tmp_path: Path) -> None:
    name(tmp_path / "etc", "sb-one")
    assert identify(tmp_path / "etc", "a" * 32)
    assert sorted(os.listdir(tmp_path / "etc")) == ["hostname", "hosts", "machine-id"]
    assert b"localhost" in (tmp_path / "etc/hosts").read_bytes()


def test_links_stay_links(tmp_path: Path) -> None:
    etc, other = tmp_path / "etc", tmp_path / "other"
    etc.mkdir()
    other.mkdir()
    for each in ("hosts", "hostname", "machine-id"):
        (etc / each).symlink_to(f"../other/{each}")
    (other / "machine-id").write_text("uninitialized\n")
    name(etc, "sb-one")
    assert identify(etc, "a" * 32)
    assert all(each.is_symlink() for each in etc.iterdir())
    assert (other / "hostname").read_text() == "sb-one\n"
    assert (other / "hosts").read_bytes().endswith(OURS)
    assert (other / "machine-id").read_text() == "a" * 32 + "\n"


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hosts").mkdir()
    os.mkfifo(tmp_path / "hostname")
    (tmp_path / "machine-id").symlink_to("machine-id")
    name(tmp_path, "sb-one")
    assert not identify(tmp_path, "a" * 32)
    assert (tmp_path / "hosts").is_dir()
    assert (tmp_path / "hostname").is_fifo()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "hostname").unlink()
    (tmp_path / "hostname").symlink_to("large")
    name(tmp_path, "sb-one")
    assert (tmp_path / "large").stat().st_size == 1 << 30
    name(tmp_path / "large", "sb-one")
    assert not identify(tmp_path / "large", "a" * 32)


@pytest.mark.root
def test_names_in_etc_survive_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "machine-id").write_text("old\n")
    subprocess.run(["mount", "--bind", str(tmp_path), str(tmp_path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
        name(tmp_path, "sb-one")
        assert not identify(tmp_path, "a" * 32)
        assert (tmp_path / "machine-id").read_text() == "old\n"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_files_that_are_more_than_plain(tmp_path: Path) -> None:
    hosts, hostname = tmp_path / "hosts", tmp_path / "hostname"
    for path in (hosts, hostname):
        path.write_text("old\n")
    os.setxattr(hosts, "user.note", b"mine")
    (tmp_path / "second").hardlink_to(hostname)
    (tmp_path / ".wrenn-upload-machine-id").write_text("what a crash left")
    (tmp_path / "machine-id").write_text("")
    name(tmp_path, "sb-one")
    assert identify(tmp_path, "a" * 32)
    assert os.getxattr(hosts, "user.note") == b"mine"
    assert hosts.read_bytes() == b"old\n" + OURS
    assert (tmp_path / "second").read_text() == hostname.read_text() == "sb-one\n"
    assert (tmp_path / "machine-id").read_text() == "a" * 32 + "\n"


def test_what_changed_meanwhile_is_seen(tmp_path: Path) -> None:
    etc = etc_of(tmp_path)
    for text in ("", "1.2.3.4 other\n", "1.2.3.5 other\n"):
        (tmp_path / "hosts").write_text(text)
        finish(etc.set_hostname("sb-one"))
        assert (tmp_path / "hosts").read_bytes().endswith(OURS)
    (tmp_path / "hostname").unlink()
    (tmp_path / "hostname").symlink_to("missing/too")
    (tmp_path / "missing").touch()
    for _ in range(2):
        finish(etc.set_hostname("sb-one"))
    (tmp_path / "missing").unlink()
    finish(etc.set_hostname("sb-one"))
    assert (tmp_path / "hostname").read_text() == "sb-one\n"


def test_a_machine_id_is_a_file_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "machine-id"
    path.write_text("")
    assert identify(tmp_path, "a" * 32)
    assert path.read_text() == "a" * 32 + "\n"
    subprocess.run(["sed", "-i", "s/a/b/g", str(path)], check=True)
    assert path.read_text() == "b" * 32 + "\n"
    path.unlink()
    assert identify(tmp_path, "c" * 32)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


@pytest.mark.root
def test_hosts_stays_whole_on_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "etc"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)]
    subprocess.run(mount, check=True)
    try:
        hosts = b"127.0.0.1 localhost\n" + b"#" * 4070
        (small / "hosts").write_bytes(hosts)
        (small / "filler").write_bytes(bytes(4096))
        name(small, "sb-one")
        assert (small / "hosts").read_bytes() == hosts
    finally:
        subprocess.run(["umount", str(small)], check=True)
