"""Login with GitHub as a browser sees it, and what comes of it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx2
import pytest
import uvicorn
from sqlalchemy import select

from support.api_server import PASSWORD, Server, make_settings, serve
from support.browser import Browser, Browsers, end_of, is_cleared, set_cookie
from support.github import (
    CALLBACK,
    CLIENT_ID,
    CLIENT_SECRET,
    EMAILS,
    TOKEN,
    USER,
    Email,
    GitHub,
    Person,
    ada,
    answer,
    github,
    with_github,
)
from support.host_double import HostDouble
from support.rows import count_rows
from wrenn_sandbox.control.store.database import Database
from wrenn_sandbox.control.store.tables import identities
from wrenn_sandbox.settings import Settings

ON_SQLITE = pytest.mark.parametrize("database_url", [None])


async def test_a_first_login_makes_an_account_and_a_second_finds_it(
    wrenn: Server, oauth: Settings, browsers: Browsers, hub: GitHub
) -> None:
    first = await (await browsers.new()).login()
    assert first.keys() == {"token", "user_id", "team_id", "email"}
    assert first["email"] == "ada@example.com"
    hub.person.login = "countess"
    hub.person.emails = [Email("countess@example.com")]
    second = await (await browsers.new()).login()
    assert {**second, "token": ""} == {**first, "token": ""}
    assert await count_rows(oauth, "users", "teams", "memberships", "identities") == [1, 1, 1, 1]
    for token in (first["token"], second["token"]):
        bearer = {"Authorization": f"Bearer {token}"}
        key = await wrenn.client().post("/v1/api-keys", json={}, headers=bearer)
        assert key.status_code == 201
        assert key.json()["team_id"] == first["team_id"]


async def test_people_are_told_apart_by_number_alone(
    oauth: Settings, browsers: Browsers, hub: GitHub
) -> None:
    ada = await (await browsers.new()).login()
    hub.person = Person(9020, "ada", [Email("other@example.com")])
    other = await (await browsers.new()).login()
    assert other["user_id"] != ada["user_id"]
    assert other["team_id"] != ada["team_id"]
    database = Database(oauth.sql_url)
    async with database.read() as connection:
        rows = await connection.execute(select(identities.c.provider, identities.c.subject))
        assert sorted(tuple(row) for row in rows) == [("github", "9019"), ("github", "9020")]
    await database.close()


async def test_twenty_first_logins_at_once_make_one_account(
    oauth: Settings, browsers: Browsers
) -> None:
    started = [await browsers.new() for _ in range(20)]
    ends = await asyncio.gather(*(browser.login() for browser in started))
    assert {end.get("user_id") for end in ends} == {ends[0]["user_id"]}
    assert {end.get("team_id") for end in ends} == {ends[0]["team_id"]}
    assert await count_rows(oauth, "users", "teams", "memberships", "identities") == [1, 1, 1, 1]


@ON_SQLITE
async def test_the_way_there(wrenn: Server, browsers: Browsers, hub: GitHub) -> None:
    browser = await browsers.new()
    response = await browser.client.get("/v1/auth/oauth/github", follow_redirects=False)
    url = httpx2.URL(response.headers["location"])
    assert str(url).startswith(f"{hub.url}/login/oauth/authorize?")
    params = dict(url.params)
    state = params.pop("state")
    assert len(params.pop("code_challenge")) == 43
    assert params == {
        "client_id": CLIENT_ID,
        "redirect_uri": CALLBACK,
        "response_type": "code",
        "scope": "user:email",
        "code_challenge_method": "S256",
    }
    assert state != (await browsers.departed())[2]
    assert response.headers["cache-control"] == "no-store"
    assert CLIENT_SECRET not in str(response.headers)


@pytest.mark.parametrize(
    ("public_url", "path", "secure"),
    [
        ("https://wrenn.test", "/v1/auth/oauth", True),
        ("http://wrenn.test", "/v1/auth/oauth", False),
        ("https://wrenn.test/sandboxes/", "/sandboxes/v1/auth/oauth", True),
    ],
)
@ON_SQLITE
async def test_the_state_cookie_is_for_its_path_and_ten_minutes(
    hub: GitHub,
    host: HostDouble,
    tmp_path: Path,
    database_url: None,
    public_url: str,
    path: str,
    secure: bool,
) -> None:
    settings = with_github(hub, tmp_path, database_url, public_url=public_url)
    async with serve(settings, host) as server:
        client = server.client()
        for route, age in (("github", "600"), ("github/callback", "0"), ("other/callback", "0")):
            cookie = set_cookie(await client.get(f"/v1/auth/oauth/{route}"))
            assert cookie["max-age"] == age
            assert cookie["path"] == path
            assert cookie["httponly"] is True
            assert cookie["samesite"] == "lax"
            assert bool(cookie["secure"]) is secure
            assert cookie["domain"] == ""
        begun = await client.get("/v1/auth/oauth/github")
        redirect_uri = httpx2.URL(begun.headers["location"]).params["redirect_uri"]
        assert redirect_uri == public_url.rstrip("/") + "/v1/auth/oauth/github/callback"


async def test_an_oauth_user_has_no_password(wrenn: Server, browsers: Browsers) -> None:
    await (await browsers.new()).login()
    for password in ("", PASSWORD, "None"):
        body = {"email": "ada@example.com", "password": password}
        refused = await wrenn.client().post("/v1/auth/login", json=body)
        assert refused.status_code == 401
        assert refused.json()["error"]["message"] == "Wrong email or password"
    body = {"email": "ada@example.com", "password": PASSWORD}
    taken = await wrenn.client().post("/v1/auth/signup", json=body)
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "email_taken")


@ON_SQLITE
async def test_providers_that_there_are_not(
    wrenn: Server, host: HostDouble, tmp_path: Path, database_url: None
) -> None:
    async with serve(make_settings(tmp_path / "plain", database_url), HostDouble()) as plain:
        for server, name in ((wrenn, "gitlab"), (wrenn, "GitHub"), (plain, "github")):
            for end in ("", "/callback?error=x"):
                refused = await server.client().get(f"/v1/auth/oauth/{name}{end}")
                assert refused.status_code == 404
                assert refused.json()["error"]["code"] == "provider_not_found"


@ON_SQLITE
async def test_logins_with_a_provider_are_limited_in_number(
    hub: GitHub, host: HostDouble, tmp_path: Path, database_url: None
) -> None:
    limits = {"auth_attempts_per_address": "3/minute"}
    async with serve(with_github(hub, tmp_path, database_url, **limits), host) as server:
        browser = Browser(server.app)
        async with browser.client as client:
            for _ in range(3):
                assert await browser.come_back(error="x") == {"error": "access_denied"}
            refused = await client.get("/v1/auth/oauth/github/callback?error=x")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limited"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert is_cleared(refused)


@ON_SQLITE
async def test_what_the_front_end_is_told_is_encoded(browsers: Browsers, hub: GitHub) -> None:
    hub.person.emails = [Email("a+b&token=x#y@example.com")]
    browser = await browsers.new()
    response = await browser.client.get("/v1/auth/oauth/github")
    assert end_of(response)["email"] == "a+b&token=x#y@example.com"
    assert b"a%2Bb%26token%3Dx%23y%40example.com" in response.url.query


@ON_SQLITE
async def test_github_enterprise_and_github_com(
    hub: GitHub, host: HostDouble, tmp_path: Path, database_url: None, browsers: Browsers
) -> None:
    """The API of an Enterprise Server is found below its login pages."""
    await (await browsers.new()).login()
    assert [len(hub.asked(path)) for path in (TOKEN, USER, EMAILS)] == [1, 1, 1]
    assert hub.asked(EMAILS)[0].query == {"per_page": "100"}
    hub.instead[USER] = hub.instead[EMAILS] = _nothing
    elsewhere = {"oauth_github_api_url": f"{hub.url}/elsewhere/"}
    async with serve(with_github(hub, tmp_path, database_url, **elsewhere), host) as server:
        browser = Browser(server.app)
        async with browser.client:
            assert await browser.login() == {"error": "exchange_failed"}
    assert [each.path for each in hub.requests][-1] == "/elsewhere/user"


async def _nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(500, None))


class _Listener(uvicorn.Server):
    """Serves on a socket that is there before the application is."""

    @asynccontextmanager
    async def serving(self, listener: socket.socket) -> AsyncIterator[None]:
        task = asyncio.create_task(self._serve(sockets=[listener]))
        try:
            yield
        finally:
            self.should_exit = True
            await task


@ON_SQLITE
async def test_over_real_connections(host: HostDouble, tmp_path: Path, database_url: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with AsyncExitStack() as stack:
            hub = await stack.enter_async_context(
                github(f"{url}/v1/auth/oauth/github/callback", ada())
            )
            others = {"public_url": url, "oauth_redirect_url": hub.url}
            settings = with_github(hub, tmp_path, database_url, **others)
            server = await stack.enter_async_context(serve(settings, host))
            config = uvicorn.Config(server.app, lifespan="off", log_config=None)
            await stack.enter_async_context(_Listener(config).serving(listener))
            client = httpx2.AsyncClient(follow_redirects=True, trust_env=False)
            await stack.enter_async_context(client)
            last = await client.get(f"{url}/v1/auth/oauth/github")
            (arrived,) = hub.asked("/auth/github/callback")
            assert arrived.query["email"] == "ada@example.com"
            bearer = {"Authorization": f"Bearer {arrived.query['token']}"}
            assert (await client.get(f"{url}/v1/api-keys", headers=bearer)).json() == []
            assert [each.status_code for each in last.history] == [302, 302, 302]
            assert not client.cookies
            assert all("cookie" not in each.headers for each in hub.requests)
