"""What browsers are told: headers of security, other origins, and who asks behind a proxy."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Origin

from support.api_server import Server, make_settings, serve
from support.host_double import HostDouble
from support.listening import edge

_APP = "https://app.example.com"
_SAFE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@pytest.fixture
async def open_server(tmp_path: Path, host: HostDouble) -> AsyncIterator[Server]:
    """A server that lets pages of one origin in, behind a proxy at 192.0.2.7."""
    settings = make_settings(
        tmp_path,
        None,
        cors_origins=f"{_APP}, http://localhost:3000",
        trusted_proxies="192.0.2.7",
        auth_attempts_per_address="3/minute",
        max_connections_per_address=2,
    )
    async with serve(settings, host) as server:
        yield server


def _client(server: Server, peer: str, scheme: str = "http") -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=server.app, client=(peer, 1), raise_app_exceptions=False)
    client = httpx2.AsyncClient(transport=transport, base_url=f"{scheme}://wrenn.test")
    server.clients.append(client)
    return client


async def test_every_answer_is_safe(open_server: Server) -> None:
    client = _client(open_server, "198.51.100.1")
    for method, path in (
        ("GET", "/health"),
        ("GET", "/docs"),
        ("GET", "/docs.js"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("GET", "/v1/sandboxes"),
        ("DELETE", "/health"),
        ("GET", "/metrics"),
        ("POST", "/v1/auth/login"),
        ("OPTIONS", "/v1/sandboxes"),
    ):
        answer = await client.request(method, path)
        assert answer.headers.items() >= _SAFE.items(), path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        for name in ("strict-transport-security", "server", "access-control-allow-origin"):
            assert name not in answer.headers, path


async def test_browsers_stay_with_tls(open_server: Server) -> None:
    proxied = _client(open_server, "192.0.2.7")
    for client, proto, stays in (
        (_client(open_server, "198.51.100.1", "https"), None, True),
        (proxied, "https", True),
        (proxied, "http", False),
        (proxied, None, False),
        (_client(open_server, "198.51.100.1"), "https", False),
    ):
        headers = {} if proto is None else {"X-Forwarded-Proto": proto}
        answer = await client.get("/health", headers=headers)
        assert ("strict-transport-security" in answer.headers) is stays


async def test_pages_of_named_origins(open_server: Server) -> None:
    """Errors can be read as well, the server's own included."""
    client = _client(open_server, "198.51.100.1")
    for path, status in (("/health", 200), ("/v1/sandboxes", 401), ("/nowhere", 404)):
        answer = await client.get(path, headers={"Origin": _APP})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == _APP
        assert "access-control-allow-credentials" not in answer.headers
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]
    for origin in (
        "https://app.example.com.evil.example",
        "http://app.example.com",
        "https://app.example.com:444",
        "https://APP.example.com",
        "null",
        "",
    ):
        answer = await client.get("/health", headers={"Origin": origin})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers, origin


async def test_no_pages_unless_they_are_named(tmp_path: Path, host: HostDouble) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    async with serve(make_settings(tmp_path, None), host) as server:
        for method, headers in (("GET", {}), ("OPTIONS", asks)):
            answer = await server.client(checked=False).request(
                method, "/v1/sandboxes", headers={"Origin": _APP, **headers}
            )
            assert answer.status_code in (401, 405)
            assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_a_failure_can_be_read(open_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    team = await open_server.team()
    monkeypatch.setattr(open_server.plane.sandboxes, "page", broken)
    answer = await _client(open_server, "198.51.100.1").get(
        "/v1/sandboxes", headers={"Origin": _APP, "X-API-Key": team.key}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["access-control-allow-origin"] == _APP
    assert answer.headers.items() >= _SAFE.items()


async def test_preflights_of_named_origins_are_answered(open_server: Server) -> None:
    client = _client(open_server, "198.51.100.1")

    async def ask(origin: str, method: str, headers: str) -> httpx2.Response:
        answer = await client.options(
            "/v1/sandboxes",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": method,
                "Access-Control-Request-Headers": headers,
            },
        )
        assert answer.headers["x-request-id"]
        assert answer.headers.items() >= _SAFE.items()
        return answer

    answer = await ask(_APP, "POST", "authorization, content-type, x-api-key")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == _APP
    assert "POST" in answer.headers["access-control-allow-methods"]
    for origin, method, headers, status, code in (
        ("https://evil.example", "POST", "x-api-key", 403, "forbidden"),
        (_APP, "TRACE", "x-api-key", 400, "invalid_request"),
        (_APP, "POST", "x-something", 400, "invalid_request"),
    ):
        answer = await ask(origin, method, headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_limits_count_clients_and_not_proxies(open_server: Server) -> None:
    """Neither a client nor what it sends through the proxy can pass for another one."""
    account = {"email": "a@example.com", "password": "wrong password"}

    async def login(peer: str, forwarded_for: str) -> int:
        answer = await _client(open_server, peer).post(
            "/v1/auth/login", json=account, headers={"X-Forwarded-For": forwarded_for}
        )
        return answer.status_code

    for number in range(3):
        assert await login("192.0.2.7", f"10.0.0.{number}, 203.0.113.1") == 401
    assert await login("192.0.2.7", "10.9.9.9, 203.0.113.1") == 429
    assert await login("203.0.113.1", "203.0.113.99") == 429
    for number in range(3):
        assert await login("192.0.2.7", f"2001:db8::{number}") == 401
    assert await login("192.0.2.7", "2001:db8::ffff") == 429
    assert await login("192.0.2.7", "203.0.113.2") == 401


async def test_requests_at_once(open_server: Server, host: HostDouble) -> None:
    team = await open_server.team()
    gate = host.hold("create")
    key = {"X-API-Key": team.key}
    one = _client(open_server, "203.0.113.1")
    creating = [open_server.start(one.post("/v1/sandboxes", headers=key)) for _ in range(2)]
    await gate.arrived.wait()
    busy = await one.get("/health")
    assert (busy.status_code, busy.json()["error"]["code"]) == (429, "rate_limited")
    assert busy.headers["retry-after"] == "1"
    assert (await _client(open_server, "203.0.113.2").get("/health")).status_code == 200
    gate.opened.set()
    assert [(await each).status_code for each in creating] == [201, 201]
    assert (await one.get("/health")).status_code == 200


async def test_upgrades_from_other_origins(open_server: Server) -> None:
    """Harmless: what a browser cannot send, a header, or the first message holds the secret."""
    async with (
        edge(open_server.app, open_server.settings) as server,
        connect(
            f"ws://127.0.0.1:{server.port}/v1/sandboxes/sb-x/exec/stream",
            origin=Origin("https://evil.example"),
        ) as peer,
    ):
        await peer.send('{"type": "start", "cmd": "id"}')
        assert '"error"' in str(await peer.recv())
        await peer.wait_closed()
        assert peer.close_code == 4400
