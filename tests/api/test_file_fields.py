"""What may be said of a file beside its content: user, mode, and a path that is no text."""

import base64
import hashlib

import httpx2
import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble

pytestmark = pytest.mark.slow

_BOUNDARY = "b0undary"
_ROUTES = ("write", "stream/write")
_RAW = b"raw-\xff\xfe"
_RAW_PATH = base64.b64encode(_RAW).decode()


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None of this depends on the database."""
    return None


@pytest.fixture
async def sandbox(team: Team) -> str:
    return str((await team.client.post("/v1/sandboxes")).json()["id"])


async def _upload(
    team: Team, id: str, *parts: tuple[str, str | bytes], route: str, **query: str
) -> httpx2.Response:
    """A form with these parts, in this order."""
    body = b"".join(
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        + (content.encode() if isinstance(content, str) else content)
        + b"\r\n"
        for name, content in parts
    )
    return await team.client.post(
        f"/v1/sandboxes/{id}/files/{route}",
        params=query,
        content=body + f"--{_BOUNDARY}--\r\n".encode(),
        headers={"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"},
    )


async def _post(team: Team, id: str, call: str, **body: object) -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/files/{call}", json=body)


async def _output(team: Team, id: str, script: str) -> list[str]:
    answer = await team.client.post(
        f"/v1/sandboxes/{id}/exec", json={"cmd": "sh", "args": ["-c", script]}
    )
    assert answer.json()["exit_code"] == 0, answer.text
    return str(answer.json()["stdout"]).splitlines()


def _told(answer: httpx2.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


@pytest.mark.parametrize("route", _ROUTES)
async def test_user_and_mode_of_a_new_file(team: Team, sandbox: str, route: str) -> None:
    fields = (("path", "a/new"), ("user", "nobody"), ("mode", "755"))
    assert (await _upload(team, sandbox, *fields, ("file", "1"), route=route)).status_code == 204
    answer = await _upload(
        team, sandbox, ("file", "2"), route=route, path="b", user="nobody", mode="0640"
    )
    assert answer.status_code == 204
    told = await _output(team, sandbox, "stat -c '%U %a' a a/new b; cat a/new b")
    assert told == ["nobody 755", "nobody 755", "nobody 640", "12"]


@pytest.mark.parametrize("route", _ROUTES)
async def test_a_replaced_file_keeps_its_user_and_mode(
    team: Team, sandbox: str, route: str
) -> None:
    await _output(team, sandbox, "echo old > f; chown nobody f; chmod 4711 f; ln f link")
    for fields in ((("path", "f"),), (("path", "f"), ("user", "root"))):
        answer = await _upload(team, sandbox, *fields, ("file", "new"), route=route)
        assert answer.status_code == 204
        told = await _output(team, sandbox, "stat -c '%U %a %h' f; cat link")
        assert told == ["nobody 4711 2", "new"]
    parts = (("path", "f"), ("mode", "0600"), ("file", ""))
    assert (await _upload(team, sandbox, *parts, route=route)).status_code == 204
    assert await _output(team, sandbox, "stat -c '%U %a %h' f") == ["nobody 600 2"]


async def test_fields_after_the_file(team: Team, sandbox: str) -> None:
    parts: tuple[tuple[str, str], ...]
    parts = (("file", "1"), ("mode", "700"), ("user", "nobody"), ("path", "late"))
    assert (await _upload(team, sandbox, *parts, route="write")).status_code == 204
    assert await _output(team, sandbox, "stat -c '%U %a' late") == ["nobody 700"]
    for route in _ROUTES:
        parts = (("path", "late"), ("file", "2"), ("mode", "755"))
        status, code, message = _told(await _upload(team, sandbox, *parts, route=route))
        assert (status, code) == (400, "invalid_request")
        assert message.startswith("mode: must come before file")
    assert await _output(team, sandbox, "cat late; ls -A") == ["1late"]


@pytest.mark.parametrize("route", _ROUTES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("mode", value)
            for value in ("", "8", "99", "75", "07555", "0x1f", "u+x", "-644", "٧٥٥")
        ),
        *(("user", value) for value in ("", "a\0b", "x" * 300, b"\xff", "new\nline")),
        *(("raw_path", value) for value in ("", "%", "YQ", "YQBi", "eA==" * 5000)),
    ],
)
async def test_fields_that_are_not_acceptable(
    user: Team, host: HostDouble, route: str, name: str, value: str | bytes
) -> None:
    id = str((await user.client.post("/v1/sandboxes")).json()["id"])
    parts: list[tuple[str, str | bytes]] = [("path", "x"), (name, value), ("file", "1")]
    for order in (parts, [("path", "x"), ("file", "1")]):
        query = {} if order is parts else {name: value}
        if isinstance(value, bytes) and query:
            continue  # a query parameter is text
        answer = await _upload(user, id, *order, route=route, **query)  # type: ignore[arg-type]
        status, code, message = _told(answer)
        assert (status, code) == (400, "invalid_request")
        assert message.startswith((f"{name}:", "path:", "A field of the form is too long"))
    assert host.files == {}


async def test_fields_of_a_directory_that_are_not_acceptable(team: Team, sandbox: str) -> None:
    for field in ({"mode": "u+x"}, {"mode": 755}, {"user": ""}, {"user": 1}, {"raw_path": "%"}):
        status, code, message = _told(await _post(team, sandbox, "mkdir", path="d", **field))
        assert (status, code) == (400, "invalid_request")
        assert message.startswith(f"{next(iter(field))}:")
    assert await _output(team, sandbox, "ls -A") == []


async def test_a_user_that_the_sandbox_does_not_have(team: Team, sandbox: str) -> None:
    answers = [
        await _upload(team, sandbox, ("file", "1"), route=route, path="f", user="stranger")
        for route in _ROUTES
    ]
    answers.append(await _post(team, sandbox, "mkdir", path="d", user="stranger"))
    for answer in answers:
        status, code, message = _told(answer)
        assert (status, code) == (400, "invalid_request")
        assert "'stranger' does not exist" in message
    assert await _output(team, sandbox, "ls -A") == []


async def test_user_and_mode_of_a_directory(team: Team, sandbox: str) -> None:
    answer = await _post(team, sandbox, "mkdir", path="x/y", user="nobody", mode="1770")
    assert answer.json()["entry"].items() >= {"owner": "nobody", "mode": 0o1770}.items()
    assert await _output(team, sandbox, "stat -c '%U %a' x x/y") == ["nobody 755", "nobody 1770"]


@pytest.mark.parametrize("route", _ROUTES)
async def test_a_path_that_is_no_text(team: Team, sandbox: str, route: str) -> None:
    for number, fields in enumerate(((("raw_path", _RAW_PATH), ("path", "ignored")), ())):
        query = {} if fields else {"raw_path": _RAW_PATH}
        content = f"content {number}"
        answer = await _upload(team, sandbox, *fields, ("file", content), route=route, **query)
        assert answer.status_code == 204
        for reading in ("read", "stream/read"):
            read = await _post(team, sandbox, reading, raw_path=_RAW_PATH)
            assert (read.status_code, read.text) == (200, content)
    (entry,) = (await _post(team, sandbox, "list", path=".")).json()["entries"]
    assert base64.b64decode(entry["raw_path"]).endswith(b"/" + _RAW)
    assert (await _post(team, sandbox, "remove", **entry)).status_code == 204
    assert (await _post(team, sandbox, "remove", **entry)).status_code == 404
    made = (await _post(team, sandbox, "mkdir", raw_path=_RAW_PATH)).json()["entry"]
    assert made["raw_path"] == entry["raw_path"]
    answer = await _upload(
        team,
        sandbox,
        ("raw_path", base64.b64encode(_RAW + b"/below").decode()),
        ("file", ""),
        route=route,
    )
    assert answer.status_code == 204
    listed = (await _post(team, sandbox, "list", raw_path=_RAW_PATH)).json()["entries"]
    assert [each["name"] for each in listed] == ["below"]
    assert (await _post(team, sandbox, "remove", raw_path=_RAW_PATH)).status_code == 204
    assert await _output(team, sandbox, "ls -A") == []


async def test_files_of_the_kernel_are_read_and_written_through_the_api(
    team: Team, sandbox: str
) -> None:
    read = await _post(team, sandbox, "read", path="/proc/kallsyms")
    (wanted,) = await _output(team, sandbox, "sha256sum < /proc/kallsyms")
    assert hashlib.sha256(read.content).hexdigest() == wanted.split()[0]
    status, code, message = _told(await _post(team, sandbox, "read", path="/proc/2/environ"))
    assert (status, code) == (400, "invalid_request")
    assert message.endswith("no such process")


async def test_a_listing_is_depth_first(team: Team, sandbox: str) -> None:
    await _output(team, sandbox, "mkdir -p b/c; touch a b/c/d b/e f; ln -s a link; ln -s no broken")
    entries = (await _post(team, sandbox, "list", path=".", depth=9)).json()["entries"]
    assert [each["name"] for each in entries] == ["a", "b", "c", "d", "e", "broken", "f", "link"]
    links = {each["name"]: each for each in entries if each["type"] == "symlink"}
    assert links["link"]["symlink_target"] == "a"
    assert links["broken"]["symlink_target"] == "no"
    assert {each["mode"] for each in links.values()} == {0o777}


async def test_times_are_whole_seconds(team: Team, sandbox: str) -> None:
    await _output(team, sandbox, "touch -d @1700000000.9 new; touch -d @-1.5 old")
    entries = (await _post(team, sandbox, "list", path=".")).json()["entries"]
    assert [each["modified_at"] for each in entries] == [1_700_000_000, -2]


async def test_the_document_names_user_and_mode(server: Server) -> None:
    document = (await server.client().get("/openapi.json")).json()
    for route in _ROUTES:
        upload = document["paths"]["/v1/sandboxes/{id}/files/" + route]["post"]
        form = upload["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["required"] == ["path", "file"]
        assert {each["name"] for each in upload["parameters"]} == {
            *("path", "raw_path", "user", "mode")
        }
    schemas = document["components"]["schemas"]
    assert schemas["FileEntry"]["properties"]["modified_at"] == {"type": "integer"}
    for name in ("ReadFileRequest", "ListFilesRequest", "RemoveFileRequest"):
        assert schemas[name]["required"] == ["path"]
        assert schemas[name]["properties"]["raw_path"]["type"] == "string"
