"""/files: downloads, ranges, raw and form uploads, failures that leave the old file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import socket
import stat
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from support.agent_process import Agent, Reply
from support.proc import resident, wait_until

RAW = {"Content-Type": "application/octet-stream"}


def upload(agent: Agent, path: str | bytes, data: bytes, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return agent.request("POST", agent.files(path), data, RAW | named)


def form(*parts: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A form of (parameters of the content disposition, content)."""
    lines = b"".join(
        b"--XX\r\nContent-Disposition: form-data; "
        + disposition.encode()
        + b"\r\nContent-Type: text/plain\r\n\r\n"
        + content
        + b"\r\n"
        for disposition, content in parts
    )
    return lines + b"--XX--\r\n", {"Content-Type": 'multipart/form-data; boundary="XX"'}


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".wrenn-upload")]


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 9_000_000])
def test_an_uploaded_file_is_downloaded_unchanged(agent: Agent, size: int) -> None:
    data = os.urandom(size)
    path = agent.home / f"round-{size}"
    reply = upload(agent, str(path), data)
    assert reply.status == 200
    assert json.loads(reply.body) == [{"path": str(path), "name": path.name, "type": "file"}]
    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    reply = agent.request("GET", agent.files(str(path)))
    assert (reply.status, reply.body) == (200, data)
    assert reply.headers["Content-Length"] == str(size)
    assert agent.request("HEAD", agent.files(str(path))).headers["Content-Length"] == str(size)


@pytest.mark.parametrize("name", ["two words", "new\nline", "+&=#%?", "ümlaut", "quote'\""])
def test_files_with_odd_names_are_served(agent: Agent, name: str) -> None:
    assert upload(agent, name, b"odd").status == 200
    assert (agent.home / name).read_bytes() == b"odd"
    assert agent.request("GET", agent.files(name)).body == b"odd"


def test_files_whose_names_are_no_text_are_served(agent: Agent) -> None:
    path = os.fsencode(agent.home) + b"/\xff\xfe"
    reply = upload(agent, path, b"bytes")
    assert reply.status == 200
    assert json.loads(reply.body)[0]["name"] == "\ufffd\ufffd"
    assert Path(os.fsdecode(path)).read_bytes() == b"bytes"
    assert agent.request("GET", agent.files(path)).body == b"bytes"


def test_relative_paths_and_parents(agent: Agent) -> None:
    assert upload(agent, "deep/er/file", b"1").status == 200
    assert upload(agent, "~/deep/other", b"2").status == 200
    assert (agent.home / "deep/er/file").read_bytes() == b"1"
    assert (agent.home / "deep/other").read_bytes() == b"2"
    assert stat.S_IMODE((agent.home / "deep/er").stat().st_mode) == 0o755


def test_mode_is_kept_and_links_are_followed(agent: Agent) -> None:
    path = agent.home / "tool"
    path.write_bytes(b"old")
    path.chmod(0o750)
    link = agent.home / "link"
    link.symlink_to("tool")
    assert upload(agent, "link", b"new").status == 200
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_file_belongs_to_the_acting_user(agent: Agent) -> None:
    folder = agent.home.parent / "public"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in [folder.parent, *folder.parent.parents][:3]:
        parent.chmod(parent.stat().st_mode | 0o011) if parent.owner() == folder.owner() else None
    path = agent.files(str(folder / "sub" / "mine"), username="nobody")
    assert agent.request("POST", path, b"x", RAW).status == 200
    owner = 65534 if os.geteuid() == 0 else os.geteuid()
    assert (folder / "sub" / "mine").stat().st_uid == owner
    assert (folder / "sub").stat().st_uid == owner
    unknown = agent.files("x", username="no-such-user")
    for method in ("GET", "POST"):
        reply = agent.request(method, unknown, b"x" if method == "POST" else None, RAW)
        assert (reply.status, reply.json()["code"]) == (401, 401)


@pytest.mark.parametrize(
    ("wanted", "status", "content", "content_range"),
    [
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=3-5", 206, b"345", "bytes 3-5/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=5-99", 206, b"56789", "bytes 5-9/10"),
        ("bytes=1-2,4-5", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
        ("bytes=5-3", 200, b"0123456789", None),
        ("bytes=10-", 416, None, None),
        ("bytes=-0", 416, None, None),
    ],
)
def test_parts_of_a_file_are_served_by_range(
    agent: Agent, wanted: str, status: int, content: bytes | None, content_range: str | None
) -> None:
    (agent.home / "digits").write_bytes(b"0123456789")
    reply = agent.request("GET", agent.files("digits"), headers={"Range": wanted})
    assert reply.status == status
    assert reply.headers.get("Content-Range") == content_range
    if content is not None:
        assert reply.body == content
        assert reply.headers["Content-Length"] == str(len(content))


def test_range_of_a_large_file(agent: Agent) -> None:
    data = os.urandom(3_000_000)
    (agent.home / "large").write_bytes(data)
    headers = {"Range": "bytes=1000000-2999998"}
    assert agent.request("GET", agent.files("large"), headers=headers).body == data[1_000_000:-1]


def test_kernel_files_have_their_real_length(agent: Agent) -> None:
    reply = agent.request("GET", agent.files("/proc/version"))
    assert reply.body == Path("/proc/version").read_bytes()
    assert reply.headers["Content-Length"] == str(len(reply.body))


def test_what_cannot_be_read(agent: Agent) -> None:
    os.mkfifo(agent.home / "fifo")
    for path, status in (
        ("missing", 404),
        ("/etc/passwd/x", 404),
        ("/etc", 400),
        ("/dev/zero", 400),
        ("fifo", 400),
        ("", 400),
        ("nul\0", 400),
        ("x" * 300, 400),
    ):
        assert agent.request("GET", agent.files(path)).status == status, path
    assert agent.request("GET", "/files").status == 400


def test_what_cannot_be_written(agent: Agent) -> None:
    os.mkfifo(agent.home / "pipe")
    for path in (
        "/etc",
        "newdir/",
        "/dev/null",
        "pipe",
        "",
        "/etc/passwd/below",
        "/etc/passwd/a/b",
    ):
        assert upload(agent, path, b"x").status == 400, path
    assert agent.request("POST", agent.files("x"), b"x").status == 415
    assert upload(agent, "x", b"x", Content_Encoding="br").status == 415
    assert not (agent.home / "x").exists()


def test_cut_upload_leaves_the_old_file(agent: Agent) -> None:
    folder = agent.home / "cut"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")
    with closing(agent.socket()) as sock:
        sock.sendall(
            f"POST {agent.files(str(folder / 'file'))} HTTP/1.1\r\n"
            "Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n".encode()
            + bytes(500_000)
        )
        wait_until(lambda: len(leftovers(folder)) == 1)
    wait_until(lambda: not leftovers(folder))
    assert (folder / "file").read_bytes() == b"old"


def test_upload_in_chunks_of_any_size(agent: Agent) -> None:
    chunks = [os.urandom(size) for size in (1, 3_000_000, 65_536, 262_144, 2, 262_145, 999_999)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    head = (
        f"POST {agent.files('in-chunks')} HTTP/1.1\r\n"
        "Content-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    with closing(agent.socket()) as sock:
        for request in (head + framed, b"GET /health HTTP/1.1\r\n\r\n"):
            sock.sendall(request)
            assert sock.recv(1000).startswith(b"HTTP/1.1 20"), "the connection stays in step"
    assert (agent.home / "in-chunks").read_bytes() == b"".join(chunks)


@pytest.mark.parametrize(
    "body", [b"--XX\r\n", b"nothing", b"--XX\r\nContent-Disposition: x\r\n\r\nabc"]
)
def test_a_form_that_is_cut_leaves_no_file(agent: Agent, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=XX"}
    assert agent.request("POST", agent.files("cut-form"), body, headers).status == 400
    assert not (agent.home / "cut-form").exists()


def test_full_disk_keeps_the_old_file(agent: Agent, tmp_path: Path) -> None:
    limit = 1_000_000
    small = Agent(tmp_path, max_file_size=limit)
    try:
        (tmp_path / "file").write_bytes(b"old")
        reply = small.request("POST", small.files("file"), bytes(3 * limit), RAW)
        assert reply.status == 507
        assert (tmp_path / "file").read_bytes() == b"old"
        assert leftovers(tmp_path) == []
        assert small.request("POST", small.files("file"), b"fits", RAW).status == 200
    finally:
        assert small.stop() == ""


def test_files_are_uploaded_by_form(agent: Agent) -> None:
    content = os.urandom(300_000) + b"\r\n--X\r\n--\r\n--XY"
    body, headers = form(('name="other"', b"ignored"), ('name="file"; filename="x"', content))
    assert agent.request("POST", agent.files("formed"), body, headers).status == 200
    assert (agent.home / "formed").read_bytes() == content


def test_form_without_path_names_its_files(agent: Agent) -> None:
    body, headers = form(
        ('name="file"; filename="a/one.txt"', b"1"),
        (f'name="file"; filename="{agent.home}/two"', b""),
        ('name="file"; filename="say %22hi%22 \\"you\\""', b"3"),
        ('name="file"; filename="x"; filename*=UTF-8\'\'%C3%BC%20b', b"4"),
    )
    reply = agent.request("POST", "/files", body, headers)
    assert reply.status == 200
    names = ["one.txt", "two", 'say "hi" "you"', "ü b"]
    assert [entry["name"] for entry in json.loads(reply.body)] == names
    assert (agent.home / "a/one.txt").read_bytes() == b"1"
    assert (agent.home / "two").read_bytes() == b""
    assert (agent.home / 'say "hi" "you"').read_bytes() == b"3"
    assert (agent.home / "ü b").read_bytes() == b"4"


def test_forms_that_make_no_sense(agent: Agent) -> None:
    nothing = form(('name="other"', b"x"))
    two = form(('name="file"; filename="a"', b"1"), ('name="file"; filename="b"', b"2"))
    unnamed = form(('name="file"', b"1"))
    for (body, headers), path in ((nothing, "p"), (two, "p"), (unnamed, None)):
        url = "/files" if path is None else agent.files(path)
        assert agent.request("POST", url, body, headers).status == 400
    headers = {"Content-Type": "multipart/form-data"}
    assert agent.request("POST", agent.files("p"), b"", headers).status == 400


def test_compressed_uploads_are_unpacked(agent: Agent) -> None:
    data = b"compress me " * 100_000
    packed = gzip.compress(data[:600_000]) + gzip.compress(data[600_000:])
    assert upload(agent, "unpacked", packed, Content_Encoding="gzip").status == 200
    assert (agent.home / "unpacked").read_bytes() == data
    body, headers = form(('name="file"; filename="x"', data))
    headers["Content-Encoding"] = "gzip"
    assert agent.request("POST", agent.files("both"), gzip.compress(body), headers).status == 200
    assert (agent.home / "both").read_bytes() == data
    for broken in (packed[:-20], b"plain", b""):
        assert upload(agent, "broken", broken, Content_Encoding="gzip").status == 400
    assert not (agent.home / "broken").exists()


def test_an_upload_may_wait_for_continue(agent: Agent) -> None:
    with closing(agent.socket()) as sock:
        sock.sendall(
            f"POST {agent.files('expected')} HTTP/1.1\r\nContent-Length: 3\r\n"
            "Content-Type: application/octet-stream\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_metadata_is_kept(agent: Agent) -> None:
    probe = agent.home / "probe"
    probe.write_bytes(b"")
    try:
        os.setxattr(probe, "user.probe", b"1")
        supported = True
    except OSError:
        supported = False
    reply = upload(agent, "tagged", b"x", X_Metadata_Author="me", X_Metadata_run_id="7")
    assert reply.status == (200 if supported else 412)
    if supported:
        reply = agent.call("filesystem.Filesystem/Stat", {"path": "tagged"})
        assert json.loads(reply.body)["entry"]["metadata"] == {"author": "me", "run-id": "7"}
    assert upload(agent, "tagged", b"x", **{"X_Metadata_a.b": "c"}).status == 400


def test_shrinking_file_ends_the_transfer_abnormally(agent: Agent) -> None:
    path = agent.home / "shrinks"
    with path.open("wb") as file:
        file.truncate(200_000_000)
    with closing(agent.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(f"GET {agent.files('shrinks')} HTTP/1.1\r\n\r\n".encode())
        received = len(sock.recv(1000))
        os.truncate(path, 1_000_000)
        with closing(sock.makefile("rb")) as reader:
            while data := reader.read(1_000_000):
                received += len(data)
    assert received < 200_000_000


def test_large_transfers_need_little_memory(agent: Agent) -> None:
    before = resident(agent.process.pid)
    data = bytes(60_000_000)
    assert upload(agent, "huge", data).status == 200
    body, headers = form(('name="file"; filename="x"', data))
    assert agent.request("POST", agent.files("huge"), body, headers).status == 200
    packed = gzip.compress(data)
    assert upload(agent, "huge", packed, Content_Encoding="gzip").status == 200
    digest = hashlib.sha256(agent.request("GET", agent.files("huge")).body).digest()
    assert digest == hashlib.sha256(data).digest()
    assert resident(agent.process.pid) - before < 8_000_000
    (agent.home / "huge").unlink()


def test_signed_urls_are_accepted_until_they_end(fresh_agent: Agent) -> None:
    agent = fresh_agent
    token = "secret"
    assert agent.request("POST", "/init", b'{"accessToken":"secret"}').status == 204

    def signed(path: str, operation: str, user: str = "", expiry: int | None = None) -> str:
        parts = [path, operation, user, token] + ([str(expiry)] if expiry else [])
        digest = hashlib.sha256(":".join(parts).encode()).digest()
        signature = "v1_" + base64.b64encode(digest).decode().rstrip("=")
        url = f"/files?path={quote(path)}&signature={quote(signature, safe='')}"
        url += f"&username={user}" if user else ""
        return url + (f"&signature_expiration={expiry}" if expiry else "")

    now = int(time.time())
    assert agent.request("POST", signed("a file", "write"), b"data", RAW).status == 200
    assert agent.request("GET", signed("a file", "read")).body == b"data"
    assert agent.request("GET", signed("a file", "read", "root", now + 60)).body == b"data"
    expired = agent.request("GET", signed("a file", "read", expiry=now - 60))
    assert expired.json() == {"code": 401, "message": "signature is already expired"}
    assert expired.status == 401
    assert agent.request("GET", signed("a file", "write")).status == 401
    assert agent.request("POST", signed("a file", "read"), b"x", RAW).status == 401
    url = signed("a file", "read", expiry=now + 60)
    assert agent.request("GET", url.replace(str(now + 60), str(now + 99))).status == 401
    assert agent.request("GET", signed("a file", "read").replace("v1_", "v2_")).status == 401
    assert (
        agent.request("GET", signed("a file", "read").replace("/files", "/metrics")).status == 401
    )
    assert (
        agent.request("GET", signed("a file", "read"), headers={"X-Access-Token": ""}).status == 401
    )
