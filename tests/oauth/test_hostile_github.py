"""A GitHub that fails, lies, stalls and floods: `exchange_failed`, soon and in little memory."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from support.api_server import Server, eventually, serve
from support.browser import Browser
from support.github import (
    CALLBACK,
    CLIENT_ID,
    CLIENT_SECRET,
    EMAILS,
    TOKEN,
    USER,
    GitHub,
    Misbehaviour,
    answer,
    raw,
    with_github,
)
from support.host_double import HostDouble

pytestmark = pytest.mark.slow

_STEPS = (TOKEN, USER, EMAILS)
_DEADLINE = 0.4
_FAILED = {"error": "exchange_failed"}
_GOOD = {
    TOKEN: {"access_token": "gho_forged", "token_type": "bearer"},
    USER: {"id": 9019},
    EMAILS: [{"email": "ada@example.com", "primary": True, "verified": True}],
}


@pytest.fixture
async def wrenn(hub: GitHub, host: HostDouble, tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(with_github(hub, tmp_path, None), host) as server:
        yield server


@pytest.fixture
async def hasty(hub: GitHub, host: HostDouble, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that does not wait long."""
    settings = with_github(hub, tmp_path / "hasty", None, oauth_timeout_sec=_DEADLINE)
    async with serve(settings, host) as server:
        yield server


def _saying(content: bytes) -> Misbehaviour:
    async def misbehave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)

    return misbehave


async def _login(server: Server) -> dict[str, str]:
    browser = Browser(server.app)
    async with browser.client:
        return await browser.login()


_NO_JSON = (
    b"",
    b"null",
    b"{",
    b"nonsense",
    b"access_token=gho_forged&token_type=bearer",
    b"\xff\xfe",
    b'{"id": "\xff"}',
    b'"text"',
    b"[[]]",
    b"[1]",
    b"{}",
    b"[" * 100_000 + b"]" * 100_000,
    b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"x":' * 50_000 + b"1" + b"}" * 50_000,
)


@pytest.mark.parametrize("step", _STEPS)
async def test_answers_that_are_not_what_they_should_be(
    wrenn: Server, hub: GitHub, step: str
) -> None:
    for body in _NO_JSON:
        hub.instead[step] = _saying(raw(200, body))
        assert await _login(wrenn) == _FAILED, body[:40]
    for status in (201, 204, 400, 401, 403, 404, 429, 500, 503):
        hub.instead[step] = _saying(answer(status, _GOOD[step]))
        assert await _login(wrenn) == _FAILED, status
    hub.instead[step] = _saying(b"SSH-2.0-OpenSSH_9.2\r\n")
    assert await _login(wrenn) == _FAILED
    hub.instead[step] = _saying(b"")
    assert await _login(wrenn) == _FAILED
    del hub.instead[step]
    assert "token" in await _login(wrenn)


_WRONG: list[tuple[str, object]] = [
    *(
        (USER, {"id": id})
        for id in (0, -1, "9019", 9019.5, True, None, [9019], 2**64, int("9" * 400))
    ),
    (USER, {"login": "ada"}),
    *(
        (TOKEN, {"access_token": token, "token_type": "bearer"})
        for token in ("", "a\r\nX-Injected: 1", "a\n", "a b", "\u00e9", "x" * 5000, None, 1)
    ),
    (TOKEN, {"access_token": "gho_forged", "token_type": "mac"}),
    (TOKEN, {"access_token": "gho_forged"}),
    (TOKEN, {"error": "bad_verification_code", "error_description": "gho_leaked"}),
    (EMAILS, {"email": "ada@example.com", "primary": True, "verified": True}),
    (EMAILS, ["ada@example.com"]),
    (EMAILS, [{"email": "ada@example.com", "primary": "true", "verified": "true"}]),
    (EMAILS, [{"email": "ada@example.com", "primary": 1, "verified": 1}]),
    (EMAILS, [{"email": None, "primary": True, "verified": True}]),
    (EMAILS, [{"email": "ada@example.com"}]),
]


async def test_answers_of_the_wrong_types(wrenn: Server, hub: GitHub) -> None:
    for step, content in _WRONG:
        hub.instead = {step: _saying(answer(200, content))}
        assert await _login(wrenn) == _FAILED, (step, str(content)[:60])
    for step in (USER, EMAILS):
        hub.instead = {step: _saying(answer(200, _GOOD[step]))}
        assert "token" in await _login(wrenn)


@pytest.mark.parametrize("step", _STEPS)
async def test_redirects_are_not_followed(wrenn: Server, hub: GitHub, step: str) -> None:
    for location in (f"{hub.url}/trap", "/trap", "http://[", "file:///etc/passwd", ""):
        for status in (301, 302, 307, 308):
            hub.instead[step] = _saying(answer(status, _GOOD[step], Location=location))
            assert await _login(wrenn) == _FAILED, location
    assert hub.asked("/trap") == []


@pytest.mark.parametrize("step", _STEPS)
@pytest.mark.parametrize("announced", [True, False])
async def test_a_flood_of_a_provider_is_cut_off(
    wrenn: Server, hub: GitHub, step: str, announced: bool
) -> None:
    sent = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        length = b"Content-Length: 1000000000000\r\n" if announced else b""
        writer.write(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n")
        while True:
            writer.write(b" " * 65536)
            await writer.drain()
            sent += 65536

    hub.instead[step] = flood
    begin = time.monotonic()
    assert await _login(wrenn) == _FAILED
    assert time.monotonic() - begin < 5
    assert sent < 16 * 1024 * 1024


async def test_headers_without_end_end_the_login(wrenn: Server, hub: GitHub) -> None:
    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-More: " + b"x" * 8000 + b"\r\n")
            await writer.drain()

    hub.instead[USER] = flood
    assert await _login(wrenn) == _FAILED


async def _silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def _drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(_DEADLINE / 20)


async def _interim(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(_DEADLINE / 20)


@pytest.mark.parametrize("misbehaviour", [_silence, _drip, _interim])
async def test_a_slow_provider_is_given_up(
    hasty: Server, hub: GitHub, misbehaviour: Misbehaviour
) -> None:
    for step in _STEPS:
        hub.instead = {step: misbehaviour}
        begin = time.monotonic()
        assert await _login(hasty) == _FAILED
        assert time.monotonic() - begin < _DEADLINE + 3


async def test_many_slow_ones_leave_the_rest_of_the_api_alone(hasty: Server, hub: GitHub) -> None:
    hub.instead = {TOKEN: _silence}
    logins = [hasty.start(_login(hasty)) for _ in range(30)]
    await eventually(lambda: bool(hub.asked(TOKEN)))
    assert (await hasty.client().get("/health")).status_code == 200
    begin = time.monotonic()
    assert await asyncio.gather(*logins) == [_FAILED] * 30
    assert time.monotonic() - begin < _DEADLINE + 5


async def test_a_github_that_cannot_be_reached_ends_the_login(
    hub: GitHub, host: HostDouble, tmp_path: Path
) -> None:
    nowhere = {"oauth_github_api_url": "http://127.0.0.1:1"}
    async with serve(with_github(hub, tmp_path, None, **nowhere), host) as server:
        assert await _login(server) == _FAILED


async def test_truncated_and_compressed_answers(wrenn: Server, hub: GitHub) -> None:
    good = answer(200, _GOOD[USER])
    bomb = gzip.compress(b" " * 50_000_000 + b'{"id": 9019}')
    for content in (
        good[:-1],
        raw(200, bomb, Content_Encoding="gzip"),
        raw(200, gzip.compress(b'{"id": 9019}'), Content_Encoding="gzip"),
    ):
        hub.instead[USER] = _saying(content)
        assert await _login(wrenn) == _FAILED


async def test_cookies_of_one_login_are_not_sent_with_another(wrenn: Server, hub: GitHub) -> None:
    hub.instead[USER] = _saying(answer(200, _GOOD[USER], Set_Cookie="session=ada; Path=/"))
    for _ in range(2):
        assert "token" in await _login(wrenn)
    assert all("cookie" not in each.headers for each in hub.asked(USER) + hub.asked(EMAILS))


async def test_nothing_secret_is_logged(wrenn: Server, hub: GitHub) -> None:
    leaky = {"error": "gho_leaked", "message": "gho_leaked"}
    with structlog.testing.capture_logs() as logs:
        ends = [await _login(wrenn)]
        for step in _STEPS:
            for content in (answer(200, leaky), answer(500, leaky), b"gho_leaked\r\n"):
                hub.instead = {step: _saying(content)}
                ends.append(await _login(wrenn))
        hub.instead, hub.declines = {}, True
        ends.append(await _login(wrenn))
    assert [end.get("error") for end in ends].count("exchange_failed") == 9
    assert {each["event"] for each in logs} >= {"login", "login refused"}
    text = repr(logs)
    secrets = {CLIENT_SECRET, "gho_", ends[0]["token"], "ada@example.com"}
    for request in hub.requests:
        secrets |= {*request.query.values(), *request.form.values()}
    secrets -= {"authorization_code", "code", "S256", "user:email", "100", CLIENT_ID, CALLBACK}
    assert [each for each in secrets if each in text] == []
