"""/files: what a file that is replaced keeps, whose a new one is, and what is written in place."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agent_process import Agent, Json, Reply, sub
from support.proc import resident

pytestmark = pytest.mark.root

RAW = {"Content-Type": "application/octet-stream"}
NOBODY = 65534
_CAPABILITY = struct.pack("<IIIII", 0x02000000, 1 << 10, 0, 0, 0)
"""cap_net_bind_service, permitted."""


def upload(agent: Agent, path: Path, data: bytes, **query: str) -> Reply:
    return agent.request("POST", agent.files(str(path), **query), data, RAW)


def make_dir(agent: Agent, path: Path, **fields: str) -> Reply:
    return agent.call("filesystem.Filesystem/MakeDir", {"path": str(path), **fields})


def access_list(group: int) -> bytes:
    """An access list that lets `nobody` read; the group's permissions are as given."""
    entries = ((0x01, 6, -1), (0x02, 4, NOBODY), (0x04, group, -1), (0x10, 6, -1), (0x20, 0, -1))
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, number & 0xFFFFFFFF) for tag, rights, number in entries
    )


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_owner_group_mode_and_attributes_are_kept(agent: Agent) -> None:
    path = agent.home / "kept"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    os.setxattr(path, "user.note", b"mine")
    os.setxattr(path, "security.capability", _CAPABILITY)
    os.setxattr(path, "system.posix_acl_access", access_list(6))
    path.chmod(0o4760)
    before = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert before.keys() >= {"user.note", "security.capability", "system.posix_acl_access"}
    assert upload(agent, path, b"new version").status == 200
    info = path.stat()
    assert path.read_bytes() == b"new version"
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (12345, 23456, 0o4760)
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == before


def test_what_a_directory_gives_to_new_files_is_not_added(agent: Agent) -> None:
    folder = agent.home / "defaults"
    folder.mkdir()
    path = folder / "plain"
    path.write_bytes(b"old")
    os.setxattr(folder, "system.posix_acl_default", access_list(6))
    assert upload(agent, path, b"new").status == 200
    assert os.listxattr(path) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert upload(agent, folder / "made", b"new").status == 200
    assert os.listxattr(folder / "made") == ["system.posix_acl_access"]


def test_hard_links_are_kept(agent: Agent) -> None:
    path, link = agent.home / "linked", agent.home / "other-name"
    for old, new in ((b"a" * 3_000_000, b"short"), (b"short", os.urandom(2_500_000))):
        path.write_bytes(old)
        link.unlink(missing_ok=True)
        link.hardlink_to(path)
        os.setxattr(path, "user.note", b"mine")
        os.setxattr(path, "security.capability", _CAPABILITY)
        inode = path.stat().st_ino
        assert upload(agent, path, new, mode="0700").status == 200
        assert path.read_bytes() == link.read_bytes() == new
        assert path.stat().st_ino == link.stat().st_ino == inode
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert os.getxattr(path, "security.capability") == _CAPABILITY
        assert os.getxattr(path, "user.note") == b"mine"
    assert [name for name in os.listdir(agent.home) if name.startswith(".wrenn")] == []


def test_a_full_disk_leaves_the_old_file_with_all_its_links(agent: Agent, small: Path) -> None:
    path, link = small / "path", small / "link"
    path.write_bytes(b"o" * 300_000)
    link.hardlink_to(path)
    for size in (2_000_000, 600_000):  # no room beside it; room beside it and none to grow
        assert upload(agent, path, b"n" * size).status == 507
        assert path.read_bytes() == link.read_bytes() == b"o" * 300_000
        assert sorted(os.listdir(small)) == ["link", "path"]
    assert upload(agent, path, b"n" * 310_000).status == 200
    assert link.read_bytes() == b"n" * 310_000


def test_a_program_that_runs_is_replaced_but_not_written_over(agent: Agent) -> None:
    path, link = agent.home / "program", agent.home / "program-link"
    path.write_bytes(Path("/bin/sleep").read_bytes())
    path.chmod(0o755)
    with agent.start(str(path), "60") as stream:
        pid = stream.started()
        link.hardlink_to(path)
        reply = upload(agent, path, b"new")
        assert (reply.status, reply.json()["code"]) == (412, 412)
        assert "text file busy" in str(reply.json()["message"])
        link.unlink()
        assert upload(agent, path, b"new").status == 200
        assert path.read_bytes() == b"new"
        os.kill(pid, 9)
        stream.collect()


def test_a_file_that_is_a_mount_stays_one(agent: Agent, tmp_path: Path) -> None:
    path, source = agent.home / "mounted", tmp_path / "source"
    path.write_bytes(b"below")
    source.write_bytes(b"old")
    subprocess.run(["mount", "--bind", str(source), str(path)], check=True)
    try:
        assert upload(agent, path, b"new").status == 200
        assert source.read_bytes() == path.read_bytes() == b"new"
    finally:
        subprocess.run(["umount", str(path)], check=True)
    assert path.read_bytes() == b"below"


def test_files_of_the_kernel_are_written(agent: Agent) -> None:
    with agent.start("sleep", "60") as stream:
        pid = stream.started()
        score = Path(f"/proc/{pid}/oom_score_adj")
        assert upload(agent, score, b"321").status == 200
        assert score.read_text() == "321\n"
        reply = upload(agent, score, b"nonsense")
        assert reply.status == 400
        assert "invalid argument" in str(reply.json()["message"])
        assert upload(agent, score, bytes(1 << 21)).status == 412
        assert score.read_text() == "321\n"
        os.kill(pid, 9)
        stream.collect()
    reply = upload(agent, Path("/proc/version"), b"x")
    assert reply.status in (400, 403, 500)
    assert "no such file" not in str(reply.json()["message"])


def test_metadata_is_replaced_by_metadata_only(agent: Agent) -> None:
    path = agent.home / "tagged"

    def metadata() -> object:
        reply = agent.call("filesystem.Filesystem/Stat", {"path": str(path)})
        return sub(reply.json(), "entry").get("metadata")

    def tagged(**tags: str) -> int:
        headers = RAW | {f"X-Metadata-{name}": value for name, value in tags.items()}
        return agent.request("POST", agent.files(str(path)), b"x", headers).status

    assert tagged(author="me", run="7") == 200
    assert tagged() == 200
    assert metadata() == {"author": "me", "run": "7"}
    assert tagged(run="8") == 200
    assert metadata() == {"run": "8"}
    (agent.home / "tagged-link").hardlink_to(path)
    assert tagged(author="you") == 200
    assert metadata() == {"author": "you"}


def test_what_is_new_belongs_to_the_user_that_is_named(agent: Agent) -> None:
    top = agent.home / "closed"
    top.mkdir(mode=0o700)
    (top / "kept").write_bytes(b"root's")
    for number, query in enumerate(({"username": "nobody"}, {"owner": "nobody"})):
        path = top / f"new-{number}" / "below" / "file"
        assert upload(agent, path, b"x", **query).status == 200
        for each in (path, path.parent, path.parent.parent):
            assert each.stat().st_uid == NOBODY, each
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
        assert upload(agent, top / "kept", b"new", **query).status == 200
        assert (top / "kept").stat().st_uid == 0
    assert top.stat().st_uid == 0
    for name, status in (("username", 401), ("owner", 400)):
        reply = upload(agent, top / "x", b"x", **{name: "stranger"})
        assert (reply.status, reply.json()["code"]) == (status, status)
        assert "'stranger' does not exist" in str(reply.json()["message"])
    assert not (top / "x").exists()


def test_a_directory_that_hands_its_group_on(agent: Agent) -> None:
    shared = agent.home / "shared"
    shared.mkdir()
    os.chown(shared, 0, 23456)
    shared.chmod(0o2775)
    assert upload(agent, shared / "sub" / "file", b"x", owner="nobody").status == 200
    assert make_dir(agent, shared / "made", owner="nobody", mode="0750").status == 200
    for name, mode in (("sub", 0o2755), ("sub/file", 0o644), ("made", 0o2750)):
        info = (shared / name).stat()
        assert (info.st_uid, info.st_gid) == (NOBODY, 23456), name
        assert stat.S_IMODE(info.st_mode) == mode, name


@pytest.mark.parametrize(("text", "mode"), [("755", 0o755), ("0644", 0o644), ("4711", 0o4711)])
def test_uploads_set_the_mode_asked_for(agent: Agent, text: str, mode: int) -> None:
    path = agent.home / f"mode-{text}"
    for content in (b"new", b"replaced"):
        path.chmod(0o600) if path.exists() else None
        assert upload(agent, path, content, mode=text).status == 200
        assert stat.S_IMODE(path.stat().st_mode) == mode
    reply = make_dir(agent, agent.home / f"dir-{text}" / "below", mode=text, owner="nobody")
    entry = sub(reply.json(), "entry")
    assert (entry["mode"], entry["owner"]) == (mode, "nobody")
    parent = (agent.home / f"dir-{text}").stat()
    assert (stat.S_IMODE(parent.st_mode), parent.st_uid) == (0o755, NOBODY)


@pytest.mark.parametrize("text", ["", "75", "00755", "888", "0x1f", "-755", "7 5", "u+x", "²²²"])
def test_uploads_refuse_modes_that_are_none(agent: Agent, text: str) -> None:
    path = agent.home / "unmade"
    for reply in (upload(agent, path, b"x", mode=text), make_dir(agent, path, mode=text)):
        assert reply.status == 400
        assert "octal" in str(reply.json()["message"])
    assert not path.exists()


def test_a_listing_of_uploads_says_what_was_asked_for(agent: Agent) -> None:
    reply = upload(agent, agent.home / "told", b"x", owner="nobody", mode="0600")
    assert b'"owner": "nobody", "mode": 384' in reply.body


def test_a_long_file_of_the_kernel_is_read_whole(agent: Agent) -> None:
    path = Path("/proc/kallsyms")
    wanted = path.read_bytes()
    assert len(wanted) > 4 << 20
    before = resident(agent.process.pid)
    reply = agent.request("GET", agent.files(str(path)))
    assert (reply.status, reply.body) == (200, wanted)
    assert resident(agent.process.pid) - before < 8_000_000
    reply = agent.request("HEAD", agent.files(str(path)))
    assert (reply.status, reply.body) == (200, b"")
    assert "Content-Length" not in reply.headers


def test_why_a_file_of_the_kernel_cannot_be_read(agent: Agent) -> None:
    told: list[Json] = [
        agent.request("GET", agent.files(path)).json()
        for path in ("/proc/2/environ", "/proc/2/exe", "/proc/sys/vm/compact_memory")
    ]
    assert [each["code"] for each in told] == [400, 404, 403]
    assert "no such process" in str(told[0]["message"])
    assert "leads nowhere" in str(told[1]["message"])
    assert "permission denied" in str(told[2]["message"])
