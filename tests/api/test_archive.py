"""Trees as archives through the API: on real processes, and on a host that fails when told."""

import asyncio
import io
import tarfile
from urllib.parse import quote

import httpx2
import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from support.listening import listening
from wrenn_sandbox.control.api import archive
from wrenn_sandbox.errors import AgentError, NoSpace

pytestmark = pytest.mark.slow

_END = bytes(1024)


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


def _tar(*names: str, data: bytes = b"content") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(data), 0o755
            tar.addfile(header, io.BytesIO(data))
    return made.getvalue()


async def _get(team: Team, id: str, path: str, **query: str) -> httpx2.Response:
    params = {"path": path, **query}
    return await team.client.get(f"/v1/sandboxes/{id}/files/archive", params=params)


async def _put(team: Team, id: str, path: str, body: bytes, **query: str) -> httpx2.Response:
    params = {"path": path, **query}
    return await team.client.put(f"/v1/sandboxes/{id}/files/archive", params=params, content=body)


def _told(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, str(answer.json()["error"]["code"])


async def test_a_tree_is_packed_and_unpacked_through_the_api(team: Team, sandbox: str) -> None:
    answer = await _put(team, sandbox, "new/", _tar("t/a", "t/b"))
    assert answer.status_code == 200
    assert answer.json() == {
        "entries": 2,
        "size": 14,
        "into_directory": True,
        "left_out": [],
        "left_out_count": 0,
    }
    answer = await _get(team, sandbox, "new/t", recursive="true")
    assert answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert tar.getnames() == ["t", "t/a", "t/b"]
        assert tar.getmember("t/a").mode == 0o755


async def test_archives_that_cannot_be_made_or_taken_are_refused(team: Team, sandbox: str) -> None:
    assert _told(await _get(team, sandbox, "nothing")) == (404, "not_found")
    assert _told(await _get(team, sandbox, "/etc")) == (400, "invalid_request")
    assert _told(await _get(team, sandbox, "/dev/null")) == (400, "invalid_request")
    for path in ("", "a\0b", "x" * 5000):
        assert _told(await _get(team, sandbox, path)) == (400, "invalid_request")
        assert _told(await _put(team, sandbox, path, _END)) == (400, "invalid_request")
    answer = await _get(team, sandbox, "/etc/hostname", user="nobody-here")
    assert _told(answer) == (400, "invalid_request")
    answer = await _put(team, sandbox, "x", _tar("a"), user="nobody-here")
    assert _told(answer) == (400, "invalid_request")
    for body in (b"", b"noise" * 1000, _tar("../x"), _tar("/x"), _tar("a")[:512]):
        answer = await _put(team, sandbox, "x", body)
        assert _told(answer) == (400, "invalid_request")
    answer = await _put(team, sandbox, "x", _tar("a", "b"))
    assert _told(answer) == (400, "invalid_request")
    answer = await _put(team, sandbox, "y", _tar("a"), directory="true")
    assert _told(answer) == (400, "invalid_request")
    answer = await team.client.get(f"/v1/sandboxes/{sandbox}/files/archive")
    assert _told(answer) == (400, "invalid_request")


async def test_a_refusal_in_the_middle_of_an_upload(team: Team, server: Server) -> None:
    """It is read, however much is on its way still."""
    big = _tar("../x", data=bytes(64 << 20))
    made = await team.client.post("/v1/sandboxes")
    async with listening(server.app) as port, httpx2.AsyncClient() as client:
        for id, status in ((made.json()["id"], 400), ("sb-" + "0" * 20, 404)):
            url = f"http://127.0.0.1:{port}/v1/sandboxes/{id}/files/archive?path=x"
            answer = await client.put(url, content=big, headers={"X-API-Key": team.key})
            assert answer.status_code == status, answer.text


async def test_names_that_are_no_utf_8(team: Team, sandbox: str) -> None:
    url = f"/v1/sandboxes/{sandbox}/files/archive?path=" + quote(b"bad\xff")
    assert (await team.client.put(url, content=_tar("a"))).status_code == 200
    answer = await team.client.get(url)
    assert answer.status_code == 200
    with tarfile.open(fileobj=io.BytesIO(answer.content), errors="surrogateescape") as tar:
        assert tar.getnames() == ["bad\udcff"]


async def test_an_upload_whose_client_goes(team: Team, server: Server, sandbox: str) -> None:
    """What is not complete is not there, and its program ends."""
    body = _tar("big", data=bytes(8 << 20))
    async with listening(server.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"PUT /v1/sandboxes/{sandbox}/files/archive?path=big HTTP/1.1\r\nHost: x\r\n"
            f"X-API-Key: {team.key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        writer.write(body[: 4 << 20])
        await writer.drain()
        await _processes(team, sandbox, 1)
        writer.close()
        await _processes(team, sandbox, 0)
    listing = {"path": "."}
    answer = await team.client.post(f"/v1/sandboxes/{sandbox}/files/list", json=listing)
    assert [each["name"] for each in answer.json()["entries"] if "wrenn-" in each["name"]] == []
    assert "big" not in [each["name"] for each in answer.json()["entries"]]


async def test_a_download_whose_client_goes(team: Team, server: Server, sandbox: str) -> None:
    made = {"cmd": "truncate", "args": ["-s", "1G", "big"]}
    await team.client.post(f"/v1/sandboxes/{sandbox}/exec", json=made)
    filled = {"cmd": "sh", "args": ["-c", "yes | head -c 200000000 >big"]}
    await team.client.post(f"/v1/sandboxes/{sandbox}/exec", json=filled)
    async with listening(server.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"GET /v1/sandboxes/{sandbox}/files/archive?path=big HTTP/1.1\r\nHost: x\r\n"
            f"X-API-Key: {team.key}\r\n\r\n".encode()
        )
        await reader.readexactly(100_000)
        await _processes(team, sandbox, 1)
        writer.close()
        await _processes(team, sandbox, 0)


async def test_a_head_alone_makes_no_archive(
    faulty: Server, user: Team, doubled: str, host: HostDouble
) -> None:
    host.files["x"] = bytes(1000)
    host.breaks_off = True  # whoever reads it sees an error
    answer = await user.client.head(f"/v1/sandboxes/{doubled}/files/archive?path=x")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    assert "content-length" not in answer.headers
    client = faulty.client({"X-API-Key": user.key}, checked=False)  # a body would be checked
    answer = await client.head(f"/v1/sandboxes/{doubled}/files/archive?path=y")
    assert answer.status_code == 404


async def _processes(team: Team, sandbox: str, count: int) -> None:
    async with asyncio.timeout(20):
        while True:
            answer = await team.client.get(f"/v1/sandboxes/{sandbox}/processes")
            if len(answer.json()["processes"]) == count:
                return
            await asyncio.sleep(0.05)


async def test_an_archive_may_be_large(team: Team, sandbox: str) -> None:
    answer = await _put(team, sandbox, "big", _tar("x", data=bytes(3 << 20)))
    assert answer.json()["size"] == 3 << 20
    assert [limit for _, limit in archive.BODY_LIMITS] == [None]


async def test_an_archive_that_breaks_off_never_looks_complete(
    faulty: Server, user: Team, doubled: str, host: HostDouble
) -> None:
    host.files["x"] = bytes(1000)
    host.breaks_off = True
    async with listening(faulty.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"GET /v1/sandboxes/{doubled}/files/archive?path=x HTTP/1.1\r\nHost: x\r\n"
            f"X-API-Key: {user.key}\r\n\r\n".encode()
        )
        answer = await reader.read()
        writer.close()
    assert b"\r\n0\r\n\r\n" not in answer


@pytest.mark.parametrize(
    ("error", "status"), [(NoSpace("The disk is full"), 507), (AgentError("It broke"), 502)]
)
async def test_failures_of_the_guest_end_an_archive_with_an_error(
    user: Team, doubled: str, host: HostDouble, error: Exception, status: int
) -> None:
    host.fail["unpack"] = host.fail["pack"] = error
    assert (await _put(user, doubled, "x", _END)).status_code == status
    assert (await _get(user, doubled, "x")).status_code == status


async def test_copying_an_archive_counts_as_activity(
    user: Team, faulty: Server, doubled: str, host: HostDouble
) -> None:
    gate = host.hold("unpack")
    putting = faulty.start(_put(user, doubled, "x", _END))
    await gate.arrived.wait()
    path = f"/v1/sandboxes/{doubled}"
    before = (await user.client.get(path)).json()["last_active_at"]
    gate.opened.set()
    assert (await putting).status_code == 200
    assert (await user.client.get(path)).json()["last_active_at"] > before
