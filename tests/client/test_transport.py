"""Addresses, foreign errors and what servers answer, without a server."""

import json
from datetime import UTC, datetime

import httpx2
import pytest

from wrenn_sandbox import errors as server_errors
from wrenn_sandbox.client import (
    ApiError,
    AsyncClient,
    Client,
    ClientError,
    ConnectionFailed,
    ExecTimeout,
    InvalidRequest,
    NoSpace,
    RateLimited,
    UnexpectedAnswer,
)
from wrenn_sandbox.client.errors import error_of_answer
from wrenn_sandbox.client.models import FileList
from wrenn_sandbox.client.multipart import Form, naming, upload_fields
from wrenn_sandbox.client.transport import checked_url, decode, path_of


def _client(answer: httpx2.Response | Exception) -> Client:
    def handle(request: httpx2.Request) -> httpx2.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Client("http://wrenn.test", api_key="wrn_x", transport=httpx2.MockTransport(handle))


@pytest.mark.parametrize("url", ["http://h", "https://h:1/base/", "http://[::1]:80"])
def test_urls_of_servers_are_accepted(url: str) -> None:
    assert checked_url(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url", ["", "h", "h:8080", "ftp://h", "http://", "http://h:port", "http://h?q", "http://h#f"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ClientError, match="http://HOST:PORT"):
        Client(url)


def test_names_cannot_lead_to_another_route() -> None:
    assert path_of("v1", "a/../b?c#d é") == "/v1/a%2F..%2Fb%3Fc%23d%20%C3%A9"


def test_every_code_of_the_server_has_its_error() -> None:
    def tree(kind: type[server_errors.WrennError]) -> set[str]:
        return {kind.code}.union(*(tree(each) for each in kind.__subclasses__()))

    only_in_redirects = {"access_denied", "missing_code", "exchange_failed"}
    generic = {"internal_error", "method_not_allowed", *only_in_redirects}
    for code in tree(server_errors.WrennError):
        error = error_of_answer(
            500, json.dumps({"error": {"code": code, "message": "m"}}).encode(), None
        )
        assert isinstance(error, ApiError)
        assert (type(error) is ApiError) == (code in generic), code


def test_what_an_error_carries() -> None:
    body = {"error": {"code": "rate_limited", "message": "Wait", "more": 1}}
    answer = httpx2.Response(429, json=body, headers={"Retry-After": "7"})
    with _client(answer) as client, pytest.raises(RateLimited, match="Wait") as refused:
        client.sandboxes.list()
    error = refused.value
    assert (error.code, error.message, error.status) == ("rate_limited", "Wait", 429)
    assert error.retry_after == 7
    body = {"error": {"code": "no_space", "message": "Full"}}
    assert isinstance(error_of_answer(507, json.dumps(body).encode(), "tomorrow"), NoSpace)


def test_output_of_a_command_over_its_time() -> None:
    detail = {
        "code": "exec_timeout",
        "message": "m",
        "stdout": "/w==",
        "stderr": "",
        "encoding": "base64",
    }
    error = error_of_answer(504, json.dumps({"error": detail}).encode(), None)
    assert isinstance(error, ExecTimeout)
    assert (error.stdout, error.stderr) == (b"\xff", b"")


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(502, text="<html>a proxy"),
        httpx2.Response(502, content=b"\xff"),
        httpx2.Response(302, headers={"Location": "http://elsewhere.test/"}),
        httpx2.Response(200, text="no JSON"),
        httpx2.Response(200, json=[{"id": 1}]),
    ],
)
def test_what_is_no_answer_of_a_server(answer: httpx2.Response) -> None:
    with _client(answer) as client, pytest.raises(UnexpectedAnswer):
        client.sandboxes.list()


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("cut"),
        httpx2.ReadError("reset"),
    ],
)
async def test_failures_of_the_connection(failure: httpx2.TransportError) -> None:
    with _client(failure) as client, pytest.raises(ConnectionFailed):
        client.sandboxes.list()

    def fail(request: httpx2.Request) -> httpx2.Response:
        raise failure

    transport = httpx2.MockTransport(fail)
    async with AsyncClient("http://wrenn.test", transport=transport) as other:
        with pytest.raises(ConnectionFailed):
            await other.sandboxes.list()


def test_credentials_are_sent() -> None:
    seen: list[httpx2.Headers] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers)
        return httpx2.Response(200, json=[])

    transport = httpx2.MockTransport(handle)
    with Client("http://wrenn.test", api_key="wrn_x", token="t", transport=transport) as client:
        client.sandboxes.list()
        client.use_key("wrn_y")
        client.api_keys.list()
    assert [each["x-api-key"] for each in seen] == ["wrn_x", "wrn_y"]
    assert seen[0]["authorization"] == "Bearer t"


def test_the_form_of_an_upload() -> None:
    form = Form.of(upload_fields("dir/ü.bin", None, 0o644), "mark")
    assert form.head + b"DATA" + form.tail == (
        b'--mark\r\nContent-Disposition: form-data; name="path"\r\n\r\ndir/\xc3\xbc.bin\r\n'
        b'--mark\r\nContent-Disposition: form-data; name="mode"\r\n\r\n0644\r\n'
        b'--mark\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\nDATA\r\n--mark--\r\n"
    )
    assert form.headers(4)["Content-Length"] == str(len(form.head) + 4 + len(form.tail))
    assert "Content-Length" not in form.headers(None)
    assert Form.of({}).content_type != Form.of({}).content_type


@pytest.mark.parametrize("path", ["dir/\udcff", b"dir/\xff"])
def test_a_path_that_is_no_text_is_named_by_its_bytes(path: str | bytes) -> None:
    assert naming(path) == {"raw_path": "ZGlyL/8="}
    assert upload_fields(path, "u", 0o4755) == {"raw_path": "ZGlyL/8=", "user": "u", "mode": "4755"}
    assert naming("ü") == naming("ü".encode()) == {"path": "ü"}
    with pytest.raises(InvalidRequest):
        naming("\ud800")


def test_times_of_files_in_seconds_and_as_older_servers_tell_them() -> None:
    entry = {
        "name": "a",
        "path": "/a",
        "type": "file",
        "size": 1,
        "mode": 0o644,
        "permissions": "-rw-r--r--",
        "owner": "root",
        "group": "root",
    }
    for told in (1_700_000_000, "2023-11-14T22:13:20Z"):
        body = json.dumps({"entries": [{**entry, "modified_at": told}]}).encode()
        (found,) = decode(body, FileList).entries
        assert found.modified_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
