"""Files through the API: on real processes, and on a host that fails when told."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from support.api_server import Server, Team, eventually
from support.host_double import HostDouble
from support.listening import listening
from wrenn_sandbox.control.api import files
from wrenn_sandbox.errors import AgentError, NoSpace
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.wire.messages import Phase

pytestmark = pytest.mark.slow

_ROUTES = ("write", "stream/write")
_BOUNDARY = "b0undary"


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None of this depends on the database."""
    return None


@pytest.fixture
async def sandbox(team: Team) -> str:
    return str((await team.client.post("/v1/sandboxes")).json()["id"])


@pytest.fixture
async def doubled(user: Team) -> str:
    return str((await user.client.post("/v1/sandboxes")).json()["id"])


@pytest.fixture
async def url(server: Server) -> AsyncIterator[str]:
    """The server on a port, for what only real connections show."""
    async with listening(server.app) as port:
        yield f"http://127.0.0.1:{port}"


def _part(name: str, content: bytes, filename: str = "") -> bytes:
    extra = f'; filename="{filename}"' if filename else ""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def _form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()


def _headers(boundary: str = _BOUNDARY) -> dict[str, str]:
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}


async def _write(
    team: Team, id: str, path: str | bytes, content: bytes, route: str = "write"
) -> httpx2.Response:
    raw = path.encode() if isinstance(path, str) else path
    body = _form(_part("path", raw), _part("file", content, "x"))
    return await team.client.post(
        f"/v1/sandboxes/{id}/files/{route}", content=body, headers=_headers()
    )


async def _read(team: Team, id: str, path: str, route: str = "read") -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/files/{route}", json={"path": path})


async def _post(team: Team, id: str, call: str, **body: object) -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/files/{call}", json=body)


def _told(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("route", _ROUTES)
@pytest.mark.parametrize("reading", ["read", "stream/read"])
@pytest.mark.parametrize("size", [0, 1, 65_535, 3_000_001])
async def test_what_is_written_through_the_api_is_read(
    team: Team, sandbox: str, route: str, reading: str, size: int
) -> None:
    content = os.urandom(size)
    assert (await _write(team, sandbox, "dir/new/file.bin", content, route)).status_code == 204
    answer = await _read(team, sandbox, "dir/new/file.bin", reading)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(size)
    assert answer.content == content


async def test_an_ordinary_client_can_upload(team: Team, sandbox: str) -> None:
    for route in _ROUTES:
        answer = await team.client.post(
            f"/v1/sandboxes/{sandbox}/files/{route}",
            data={"path": f"up-{len(route)}"},
            files={"file": ("name.txt", b"content", "text/plain")},
        )
        assert answer.status_code == 204, answer.text
        assert (await _read(team, sandbox, f"up-{len(route)}")).content == b"content"


@pytest.mark.parametrize("size", [7, 5_000_000])
async def test_parts_in_any_order_where_they_are_buffered(
    team: Team, sandbox: str, size: int
) -> None:
    content = os.urandom(size)
    body = _form(_part("note", b"ignored"), _part("file", content), _part("path", b"late"))
    url = f"/v1/sandboxes/{sandbox}/files/write"
    answer = await team.client.post(url, content=body, headers=_headers())
    assert answer.status_code == 204
    assert (await _read(team, sandbox, "late")).content == content


async def test_a_stream_needs_the_path_first(team: Team, sandbox: str) -> None:
    body = _form(_part("file", b"content"), _part("path", b"late"))
    url = f"/v1/sandboxes/{sandbox}/files/stream/write"
    answer = await team.client.post(url, content=body, headers=_headers())
    assert _told(answer) == (400, "invalid_request")
    assert _told(await _read(team, sandbox, "late")) == (404, "not_found")


async def test_the_path_of_a_stream_as_a_query_parameter(team: Team, sandbox: str) -> None:
    url = f"/v1/sandboxes/{sandbox}/files/stream/write"
    body = _form(_part("file", b"content"))
    name = "a b+c&d=ü\n.txt"
    answer = await team.client.post(url, params={"path": name}, content=body, headers=_headers())
    assert answer.status_code == 204
    assert (await _read(team, sandbox, name)).content == b"content"
    body = _form(_part("path", b"other"), _part("file", b"content"))
    answer = await team.client.post(url, params={"path": name}, content=body, headers=_headers())
    assert _told(answer) == (400, "invalid_request")


@pytest.mark.parametrize("route", _ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        _form(),
        _form(_part("path", b"x")),
        _form(_part("path", b""), _part("file", b"1")),
        _form(_part("path", b"a\0b"), _part("file", b"1")),
        _form(_part("path", b"p" * 5000), _part("file", b"1")),
        _form(_part("path", b"p" * 50_000), _part("file", b"1")),
        _form(_part("path", b"x"), _part("file", b"1"), _part("file", b"2")),
        _form(_part("path", b"x"), _part("file", b"1"), _part("path", b"y")),
        _form(*[_part("n", b"") for _ in range(200)], _part("path", b"x"), _part("file", b"1")),
        _form(_part("path", b"x"), _part("file", b"1"))[:-10],
        _part("path", b"x") + _part("file", b"1")[:-4],
        f"--{_BOUNDARY}\r\nX: {'y' * 10_000}\r\n\r\n".encode(),
        f"--{_BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\nx\r\n--{_BOUNDARY}--".encode(),
    ],
)
async def test_forms_that_are_not_acceptable(
    user: Team, doubled: str, host: HostDouble, route: str, body: bytes
) -> None:
    url = f"/v1/sandboxes/{doubled}/files/{route}"
    answer = await user.client.post(url, content=body, headers=_headers())
    assert _told(answer) == (400, "invalid_request")
    assert host.files == {}


async def test_bodies_that_are_no_forms(user: Team, doubled: str) -> None:
    for content_type in (
        "application/json",
        "multipart/form-data",
        "text/plain",
        "",
        f"multipart/form-data; boundary={'x' * 1000}",
    ):
        for route in _ROUTES:
            answer = await user.client.post(
                f"/v1/sandboxes/{doubled}/files/{route}",
                content=b"{}",
                headers={"Content-Type": content_type},
            )
            assert _told(answer) == (400, "invalid_request"), content_type


async def test_names_of_every_kind(team: Team, sandbox: str) -> None:
    names = ["two words", "new\nline", "ünï🦜", "x" * 255, "%41&?#", "-rf", "'\"`$(x)"]
    for name in names:
        content = name.encode()
        assert (await _write(team, sandbox, name, content)).status_code == 204
        assert (await _read(team, sandbox, name)).content == content
    listed = (await _post(team, sandbox, "list", path=".")).json()["entries"]
    assert {each["name"] for each in listed} == set(names)
    assert _told(await _write(team, sandbox, "x" * 256, b"")) == (400, "invalid_request")


async def test_a_name_that_is_no_text(team: Team, sandbox: str) -> None:
    assert (await _write(team, sandbox, b"raw-\xff\xfe", b"1")).status_code == 204
    (entry,) = (await _post(team, sandbox, "list", path=".")).json()["entries"]
    assert entry["name"] == "raw-\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert entry["raw_path"]


@pytest.mark.parametrize("route", _ROUTES)
async def test_targets_that_cannot_be_written_are_told_apart(
    team: Team, sandbox: str, route: str
) -> None:
    script = "mkdir dir; mkfifo fifo; ln -s loop loop; touch file"
    await _exec(team, sandbox, script)
    for path in ("dir", "dir/", "fifo", "loop", "/dev/null", "/", ".", "file/below"):
        answer = await _write(team, sandbox, path, b"x", route)
        assert _told(answer) == (400, "invalid_request"), path
    listed = (await _post(team, sandbox, "list", path=".", depth=3)).json()["entries"]
    assert {each["name"] for each in listed} == {"dir", "fifo", "loop", "file"}


async def _exec(team: Team, sandbox: str, script: str) -> str:
    answer = await team.client.post(
        f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "sh", "args": ["-c", script]}
    )
    assert answer.json()["exit_code"] == 0, answer.text
    return str(answer.json()["stdout"])


@pytest.mark.parametrize("route", ["read", "stream/read"])
async def test_files_that_cannot_be_read_are_told_apart(
    team: Team, sandbox: str, route: str
) -> None:
    await _exec(team, sandbox, "mkdir dir; mkfifo fifo; ln -s loop loop; ln -s nowhere dangling")
    for path in ("missing", "dir/missing", "dangling"):
        assert _told(await _read(team, sandbox, path, route)) == (404, "not_found"), path
    for path in ("dir", "fifo", "loop", "/dev/zero", "", "a\0b", "p" * 5000):
        assert _told(await _read(team, sandbox, path, route)) == (400, "invalid_request"), path


async def test_symlinks_are_followed_and_modes_are_kept(team: Team, sandbox: str) -> None:
    await _exec(team, sandbox, "echo old > real; chmod 750 real; ln -s real link")
    assert (await _write(team, sandbox, "link", b"new")).status_code == 204
    assert (await _write(team, sandbox, "fresh/file", b"")).status_code == 204
    told = await _exec(team, sandbox, "stat -c %F:%a link real fresh fresh/file; cat real")
    assert told.splitlines() == [
        "symbolic link:777",
        "regular file:750",
        "directory:755",
        "regular empty file:644",
        "new",
    ]


async def test_a_directory_is_listed_with_its_entries(team: Team, sandbox: str) -> None:
    await _exec(team, sandbox, "mkdir -p a/b; printf 12345 > a/b/file; ln -s a/b/file link")
    shallow = (await _post(team, sandbox, "list", path=".")).json()["entries"]
    assert {each["name"] for each in shallow} == {"a", "link"}
    deep = (await _post(team, sandbox, "list", path=".", depth=3)).json()["entries"]
    found = {each["name"]: each for each in deep}
    assert set(found) == {"a", "b", "file", "link"}
    assert found["a"]["type"] == "directory"
    assert found["link"]["type"] == "symlink"
    assert found["link"]["symlink_target"] == "a/b/file"
    file = found["file"]
    assert (file["type"], file["size"], file["mode"]) == ("file", 5, 0o644)
    assert (file["permissions"], file["owner"], file["group"]) == ("-rw-r--r--", "root", "root")
    assert file["path"].endswith("/a/b/file")
    assert abs(file["modified_at"] - time.time()) < 60
    assert isinstance(file["modified_at"], int)
    assert _told(await _post(team, sandbox, "list", path="missing")) == (404, "not_found")
    for body in ({"path": "a/b/file"}, {"path": "."} | {"depth": 0}, {}, {"path": ""}):
        assert _told(await _post(team, sandbox, "list", **body)) == (400, "invalid_request")


async def test_making_and_removing(team: Team, sandbox: str) -> None:
    made = await _post(team, sandbox, "mkdir", path="x/y")
    assert (made.status_code, made.json()["entry"]["type"]) == (200, "directory")
    assert _told(await _post(team, sandbox, "mkdir", path="x/y")) == (409, "conflict")
    await _write(team, sandbox, "x/y/z", b"")
    assert (await _post(team, sandbox, "remove", path="x")).status_code == 204
    assert _told(await _post(team, sandbox, "remove", path="x")) == (404, "not_found")
    assert _told(await _post(team, sandbox, "remove", path="/")) == (400, "invalid_request")


async def test_files_of_other_teams_and_states_are_refused(
    server: Server, team: Team, sandbox: str
) -> None:
    stranger = await server.team()
    for call in ("read", "stream/read", "list", "mkdir", "remove"):
        assert _told(await _post(stranger, sandbox, call, path="x")) == (404, "not_found")
    for route in _ROUTES:
        assert _told(await _write(stranger, sandbox, "x", b"", route)) == (404, "not_found")
    await team.client.post(f"/v1/sandboxes/{sandbox}/pause")
    for call in ("read", "stream/read", "list", "mkdir", "remove"):
        assert _told(await _post(team, sandbox, call, path="x")) == (409, "invalid_state")
    for route in _ROUTES:
        assert _told(await _write(team, sandbox, "x", b"", route)) == (409, "invalid_state")


async def test_credentials_come_before_the_form(faulty: Server) -> None:
    for route in _ROUTES:
        answer = await faulty.client().post(
            f"/v1/sandboxes/sb-x/files/{route}", content=b"x", headers=_headers()
        )
        assert _told(answer) == (401, "unauthorized")


async def _endless(size: int) -> AsyncIterator[bytes]:
    yield _part("path", b"big") + _part("file", b"")[:-2]
    for _ in range(size >> 20):
        yield b"x" * (1 << 20)


async def test_a_buffered_upload_over_the_limit(
    user: Team, doubled: str, host: HostDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"/v1/sandboxes/{doubled}/files/write"
    assert files.BUFFERED_LIMIT == 100 * 1024 * 1024
    headers = {**_headers(), "Content-Length": str(files.BUFFERED_LIMIT + 1)}
    answer = await user.client.post(url, content=b"x", headers=headers)
    assert _told(answer) == (413, "too_large")
    answer = await user.client.post(url, content=_endless(101 << 20), headers=_headers())
    assert _told(answer) == (413, "too_large")
    assert host.files == {}


async def test_the_disk_of_the_guest_is_full(user: Team, doubled: str, host: HostDouble) -> None:
    host.fail["write_file"] = NoSpace("x: no space left on device")
    for route in _ROUTES:
        assert _told(await _write(user, doubled, "x", b"1", route)) == (507, "no_space")


async def test_file_calls_tell_of_a_guest_that_fails(
    user: Team, doubled: str, host: HostDouble
) -> None:
    for call in ("read_file", "write_file", "list_directory"):
        host.fail[call] = AgentError("The sandbox closed the connection")
    assert _told(await _read(user, doubled, "x")) == (502, "agent_error")
    assert _told(await _write(user, doubled, "x", b"")) == (502, "agent_error")
    assert _told(await _post(user, doubled, "list", path="x")) == (502, "agent_error")
    host.phases[SandboxId(doubled)] = Phase.PAUSED
    assert _told(await _post(user, doubled, "mkdir", path="x")) == (502, "agent_error")


async def test_a_file_download_that_breaks_off_never_looks_complete(
    faulty: Server, user: Team, doubled: str, host: HostDouble
) -> None:
    host.files["x"] = bytes(1000)
    host.breaks_off = True
    async with listening(faulty.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"path": "x"})
        writer.write(
            f"POST /v1/sandboxes/{doubled}/files/stream/read HTTP/1.1\r\nHost: x\r\n"
            f"X-API-Key: {user.key}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        answer = await reader.read()
        writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"content-length: 1000" in head.lower()
    assert len(content) == 500


async def test_a_file_call_is_activity(
    faulty: Server, user: Team, doubled: str, host: HostDouble
) -> None:
    gate = host.hold("write_file")
    writing = faulty.start(_write(user, doubled, "x", b"1"))
    await gate.arrived.wait()
    assert faulty.plane.activity.users_of(SandboxId(doubled))
    gate.opened.set()
    assert (await writing).status_code == 204
    assert not faulty.plane.activity.users_of(SandboxId(doubled))
    assert (await user.client.get(f"/v1/sandboxes/{doubled}")).json()["last_active_at"]


class _Upload:
    """An upload over a real connection that goes as far as the test says."""

    def __init__(self, url: str, team: Team, sandbox: str, path: str, promised: int) -> None:
        self._address = url.removeprefix("http://").split(":")
        parts = _part("path", path.encode()) + _part("file", b"")[:-2]
        self._head = (
            f"POST /v1/sandboxes/{sandbox}/files/stream/write HTTP/1.1\r\nHost: x\r\n"
            f"X-API-Key: {team.key}\r\nContent-Type: {_headers()['Content-Type']}\r\n"
            f"Content-Length: {len(parts) + promised}\r\n\r\n"
        ).encode() + parts

    async def begin(self, content: bytes) -> None:
        host, port = self._address
        self.reader, self.writer = await asyncio.open_connection(host, int(port))
        self.writer.write(self._head + content)
        await self.writer.drain()


async def _until(team: Team, sandbox: str, script: str) -> None:
    """Wait until a script succeeds in the sandbox."""
    await _exec(
        team, sandbox, f"for _ in $(seq 200); do {script} && exit; sleep 0.05; done; exit 1"
    )


_TEMPORARY = "ls -A | grep -q wrenn-upload"


async def test_a_client_that_goes_leaves_the_old_file(
    server: Server, team: Team, sandbox: str, url: str
) -> None:
    await _write(team, sandbox, "kept", b"old")
    upload = _Upload(url, team, sandbox, "kept", 10_000_000)
    await upload.begin(bytes(1_000_000))
    await _until(team, sandbox, _TEMPORARY)
    upload.writer.transport.abort()
    await _until(team, sandbox, f"! {_TEMPORARY}")
    assert (await _read(team, sandbox, "kept")).content == b"old"
    assert not server.plane.activity.users_of(SandboxId(sandbox))


@pytest.mark.parametrize("ending", ["pause", "delete"])
async def test_an_upload_ends_with_its_sandbox(
    team: Team, sandbox: str, url: str, ending: str
) -> None:
    upload = _Upload(url, team, sandbox, "file", 10_000_000)
    await upload.begin(bytes(1_000_000))
    await _until(team, sandbox, _TEMPORARY)
    if ending == "pause":
        answer = await team.client.post(f"/v1/sandboxes/{sandbox}/pause")
    else:
        answer = await team.client.delete(f"/v1/sandboxes/{sandbox}")
    assert answer.status_code in (200, 204)
    async with asyncio.timeout(5):
        line = await upload.reader.readline()
    assert line.startswith(b"HTTP/1.1 409 ")
    upload.writer.close()


async def test_a_download_ends_with_its_sandbox(team: Team, sandbox: str, url: str) -> None:
    await _exec(team, sandbox, "truncate -s 1G big")
    async with (
        httpx2.AsyncClient(headers={"X-API-Key": team.key}) as client,
        client.stream(
            "POST", f"{url}/v1/sandboxes/{sandbox}/files/stream/read", json={"path": "big"}
        ) as answer,
    ):
        assert answer.headers["content-length"] == str(1 << 30)
        pieces = answer.aiter_raw()
        await anext(pieces)
        await team.client.delete(f"/v1/sandboxes/{sandbox}")
        async with asyncio.timeout(5):
            with pytest.raises(httpx2.HTTPError):
                await _drain(pieces)


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    async for _ in pieces:
        pass


async def test_a_client_that_stops_reading_and_goes(
    server: Server, team: Team, sandbox: str, url: str
) -> None:
    await _exec(team, sandbox, "truncate -s 1G big")
    async with (
        httpx2.AsyncClient(headers={"X-API-Key": team.key}) as client,
        client.stream(
            "POST", f"{url}/v1/sandboxes/{sandbox}/files/stream/read", json={"path": "big"}
        ) as answer,
    ):
        await anext(answer.aiter_raw())
        assert server.plane.activity.users_of(SandboxId(sandbox))
    await eventually(lambda: not server.plane.activity.users_of(SandboxId(sandbox)))


def _resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError


async def test_a_large_file_in_little_memory(team: Team, sandbox: str, url: str) -> None:
    """Client and server are this one process, the agent is another."""
    piece = os.urandom(1 << 20)
    count = 256
    wanted = hashlib.sha256()

    async def body() -> AsyncIterator[bytes]:
        yield _part("path", b"big") + _part("file", b"")[:-2]
        for _ in range(count):
            wanted.update(piece)
            yield piece
        yield b"\r\n" + _form()

    async with httpx2.AsyncClient(headers={"X-API-Key": team.key}, timeout=120) as client:
        base = f"{url}/v1/sandboxes/{sandbox}/files/stream"
        await _write(team, sandbox, "warm", piece)
        before = _resident_kib()
        answer = await client.post(f"{base}/write", content=body(), headers=_headers())
        assert answer.status_code == 204, answer.text
        given = hashlib.sha256()
        async with client.stream("POST", f"{base}/read", json={"path": "big"}) as download:
            async for each in download.aiter_raw():
                given.update(each)
        grown = _resident_kib() - before
    assert given.digest() == wanted.digest()
    assert grown < 32 * 1024, f"{grown} KiB"
