"""What every request has in common: ids, limits, unknown routes, bodies that are not JSON."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2

from support.api_server import Server, Team, make_settings, serve
from support.host_double import HostDouble
from support.listening import edge

_LIMIT = 1024 * 1024
_BAD_BODIES = (
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"1",
    b"nonsense",
    b"\xff\xfe",
    b'{"cmd": "\xff"}',
    b'{"cmd": "\\ud800"}',
    b'{"cmd": "a", "args": ["\\udfff"]}',
    b'{"cmd": "a", "timeout_sec": NaN}',
    b'{"cmd": "a", "timeout_sec": Infinity}',
    b'{"cmd": "a", "timeout_sec": 1e999}',
    b'{"cmd": "a", "timeout_sec": ' + b"9" * 10_000 + b"}",
    b'{"cmd": ' + b"[" * 100_000 + b"}",
    b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"cmd": "a"} trailing',
    b"{'cmd': 'a'}",
    b'{"cmd": "a",}',
)


def _code(response: httpx2.Response) -> str:
    return str(response.json()["error"]["code"])


async def test_bodies_that_are_not_acceptable(faulty: Server, user: Team) -> None:
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    headers = {**user.bearer, "Content-Type": "application/json"}
    for body in _BAD_BODIES:
        for path in ("/v1/auth/signup", "/v1/auth/login", f"/v1/sandboxes/{id}/exec"):
            answer = await user.client.post(path, content=body, headers=headers)
            assert (answer.status_code, _code(answer)) == (400, "invalid_request"), body[:40]


async def test_duplicate_keys_and_odd_numbers_are_read(faulty: Server, user: Team) -> None:
    answer = await user.client.post(
        "/v1/sandboxes", content=b'{"vcpus": "x", "vcpus": 2.0, "memory_mb": 1.28e2}'
    )
    assert answer.status_code == 201
    assert (answer.json()["vcpus"], answer.json()["memory_mb"]) == (2, 128)


async def test_bodies_need_the_right_content_type(faulty: Server, user: Team) -> None:
    for content_type, status in (
        ("application/json", 201),
        ("Application/JSON; charset=utf-8", 201),
        ("application/merge-patch+json", 201),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("multipart/form-data; boundary=x", 400),
        ("nonsense", 400),
        ("", 400),
    ):
        answer = await user.client.post(
            "/v1/sandboxes", content=b"{}", headers={"Content-Type": content_type}
        )
        assert answer.status_code == status, content_type


async def test_credentials_come_before_bodies(faulty: Server) -> None:
    for path in ("/v1/sandboxes", "/v1/snapshots", "/v1/api-keys", "/v1/sandboxes/x/exec"):
        answer = await faulty.client().post(path, content=b"{")
        assert (answer.status_code, _code(answer)) == (401, "unauthorized")


async def test_a_body_over_the_limit(faulty: Server, user: Team) -> None:
    body = b'{"name": "' + b" " * _LIMIT + b'"}'
    for content in (body, _chunks(body)):
        answer = await user.client.post("/v1/api-keys", content=content, headers=user.bearer)
        assert (answer.status_code, _code(answer)) == (413, "too_large")
    padded = b"{}" + b" " * (_LIMIT - 2)
    answer = await user.client.post("/v1/api-keys", content=padded, headers=user.bearer)
    assert answer.status_code == 201


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


async def test_unknown_routes_and_methods(faulty: Server, user: Team) -> None:
    for path in (
        "/v1",
        "/v1/sandboxes/",
        "/v4/sandboxes",
        "/docs/",
        "/%00",
        "http://wrenn.test//health",
    ):
        answer = await user.client.get(path)
        assert (answer.status_code, _code(answer)) == (404, "not_found"), path
    for method, path, allowed in (
        ("PATCH", "/v1/sandboxes", "GET, HEAD, POST"),
        ("PUT", "/v1/sandboxes/sb-x", "DELETE, GET, HEAD, PATCH"),
        ("GET", "/v1/sandboxes/sb-x/exec", "POST"),
        ("DELETE", "/health", "GET, HEAD"),
        ("NONSENSE", "/v1/auth/login", "POST"),
    ):
        answer = await user.client.request(method, path)
        assert (answer.status_code, _code(answer)) == (405, "method_not_allowed"), path
        assert answer.headers["allow"] == allowed


async def test_every_answer_has_a_request_id(faulty: Server) -> None:
    client = faulty.client()
    for given in ("abc", "A-1_b.c:d", "x" * 128):
        answer = await client.get("/health", headers={"X-Request-Id": given})
        assert answer.headers.get_list("x-request-id") == [given]
    for bad in ("", "a b", "x" * 129, "<script>", "a\tb"):
        answer = await client.get("/health", headers={"X-Request-Id": bad})
        assert answer.headers["x-request-id"].startswith("req-")
    first, second = await client.get("/health"), await client.get("/nowhere")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_head_is_answered_as_get_without_the_body(faulty: Server, user: Team) -> None:
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    paths = ("/", "/health", "/docs", "/openapi.json", "/v1/sandboxes", f"/v1/sandboxes/{id}")
    async with (
        edge(faulty.app, faulty.settings) as served,
        httpx2.AsyncClient(base_url=served.url, headers={"X-API-Key": user.key}) as client,
    ):
        for path in (*paths, "/v1/sandboxes/sb-x", "/nowhere", "/v1/sandboxes/sb-x/pty"):
            got, head = await client.get(path), await client.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            for name in ("content-length", "content-type", "cache-control", "location"):
                assert head.headers.get(name) == got.headers.get(name), path
        assert (await client.head("/v1/auth/login")).status_code == 405
        bare = await client.head("/v1/sandboxes", headers={"X-API-Key": "wrn_none"})
        assert bare.status_code == 401
        told = (await client.get("/metrics")).text
    assert 'method="HEAD",route="/v1/sandboxes/{id}",status="4xx"' in told.replace(" ", "")


async def test_the_root_leads_to_the_documents(faulty: Server) -> None:
    answer = await faulty.client(checked=False).get("/")
    assert (answer.status_code, answer.headers["location"]) == (302, "/docs")


async def test_health_needs_nothing(faulty: Server) -> None:
    answer = await faulty.client().get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


async def test_documents_need_nothing_but_this_server(faulty: Server) -> None:
    client = faulty.client()
    page, script = await client.get("/docs"), await client.get("/docs.js")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "://" not in page.text + script.text
    # a key that was typed there is kept nowhere and shown to nobody else
    assert "connect-src 'self';" in page.headers["content-security-policy"]
    for word in ("Storage", "cookie", "innerHTML", "eval", "name="):
        assert word not in script.text + page.text.replace('meta name="viewport"', ""), word
    assert (await client.get("/openapi.json")).json()["openapi"] == "3.1.0"


async def test_metrics_for_this_machine(faulty: Server, user: Team) -> None:
    await user.client.post("/v1/sandboxes")
    text = (await faulty.client().get("/metrics")).text
    assert 'wrenn_sandboxes{status="running"} 1.0' in text
    assert 'route="/v1/sandboxes",status="2xx"' in text
    other = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=faulty.app, client=("192.0.2.1", 1)),
        base_url="http://wrenn.test",
    )
    async with other:
        answer = await other.get("/metrics", headers={"X-Forwarded-For": "127.0.0.1"})
        assert (answer.status_code, _code(answer)) == (403, "forbidden")


async def test_metrics_with_a_token(tmp_path: Path, host: HostDouble) -> None:
    settings = make_settings(tmp_path, None, metrics_token="s3cret")
    async with serve(settings, host) as server:
        client = server.client()
        for header, status in (
            (None, 401),
            ("Bearer wrong", 401),
            ("s3cret", 401),
            ("Bearer s3cret", 200),
        ):
            headers = {} if header is None else {"Authorization": header}
            assert (await client.get("/metrics", headers=headers)).status_code == status


async def test_two_applications_do_not_share_numbers(tmp_path: Path, host: HostDouble) -> None:
    async with (
        serve(make_settings(tmp_path / "a", None), host) as one,
        serve(make_settings(tmp_path / "b", None), HostDouble()) as two,
    ):
        team = await one.team()
        await team.client.post("/v1/sandboxes")
        text = (await two.client().get("/metrics")).text
        assert 'wrenn_sandboxes{status="running"} 0.0' in text
        assert json.dumps("/v1/sandboxes") not in text
