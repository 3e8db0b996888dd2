"""Login with GitHub as a browser sees it, and each way in which it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import func, select, text, update

from api.browser import Browser, end_of, is_cleared, set_cookie
from api.double import HostDouble
from api.github import (
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
    challenge_of,
    github,
    with_github,
)
from api.harness import PASSWORD, FakeClock, Server, make_settings, serve
from wrenn_sandbox.control.oauth.state import States
from wrenn_sandbox.control.store.database import Database
from wrenn_sandbox.control.store.tables import identities, memberships, teams, users
from wrenn_sandbox.settings import Settings


@pytest.fixture
async def hub() -> AsyncIterator[GitHub]:
    async with github(CALLBACK, ada()) as hub:
        yield hub


@pytest.fixture
def oauth(hub: GitHub, tmp_path: Path, database_url: str | None) -> Settings:
    return with_github(hub, tmp_path / "data", database_url)


@pytest.fixture
async def wrenn(oauth: Settings, host: HostDouble, clock: FakeClock) -> AsyncIterator[Server]:
    async with serve(oauth, host, clock) as server:
        yield server


ON_SQLITE = pytest.mark.parametrize("database_url", [None])


@pytest.fixture
async def browsers(wrenn: Server) -> AsyncIterator["Browsers"]:
    async with AsyncExitStack() as stack:
        yield Browsers(wrenn, stack)


class Browsers:
    """Browsers with no cookies yet."""

    def __init__(self, server: Server, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack

    async def new(self, server: Server | None = None) -> Browser:
        browser = Browser((server or self._server).app)
        await self._stack.enter_async_context(browser.client)
        return browser

    async def departed(self) -> tuple[Browser, str, str]:
        """A browser on its way to GitHub, its cookie and its state."""
        browser = await self.new()
        response = await browser.client.get("/v1/auth/oauth/github", follow_redirects=False)
        assert browser.cookie is not None
        return browser, browser.cookie, httpx2.URL(response.headers["location"]).params["state"]

    async def consented(self, hub: GitHub) -> tuple[Browser, str, dict[str, str]]:
        """A browser on its way back, its cookie and what it brings."""
        browser = await self.new()
        there = await browser.client.get("/v1/auth/oauth/github", follow_redirects=False)
        back = await browser.client.get(there.headers["location"], follow_redirects=False)
        assert browser.cookie is not None
        return browser, browser.cookie, dict(httpx2.URL(back.headers["location"]).params)


async def _count(settings: Settings, *tables: str) -> list[int]:
    database = Database(settings.sql_url)
    known = {"users": users, "teams": teams, "memberships": memberships, "identities": identities}
    async with database.read() as connection:
        counts = [
            (await connection.execute(select(func.count()).select_from(known[each]))).scalar_one()
            for each in tables
        ]
    await database.close()
    return counts


async def _change(settings: Settings, statement: str) -> None:
    database = Database(settings.sql_url)
    async with database.write() as connection:
        await connection.execute(text(statement))
    await database.close()


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
    assert await _count(oauth, "users", "teams", "memberships", "identities") == [1, 1, 1, 1]
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
    assert await _count(oauth, "users", "teams", "memberships", "identities") == [1, 1, 1, 1]


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
async def test_the_cookie(
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


@ON_SQLITE
async def test_the_user_declines(browsers: Browsers, oauth: Settings, hub: GitHub) -> None:
    hub.declines = True
    assert await (await browsers.new()).login() == {"error": "access_denied"}
    assert hub.asked(TOKEN) == []
    assert await _count(oauth, "users") == [0]


@ON_SQLITE
async def test_a_refusal_needs_no_state_but_uses_it_up(browsers: Browsers, hub: GitHub) -> None:
    stranger = await browsers.new()
    assert await stranger.come_back(error="access_denied") == {"error": "access_denied"}
    browser, cookie, brought = await browsers.consented(hub)
    refused = await browser.come_back(**brought, error="redirect_uri_mismatch")
    assert refused == {"error": "access_denied"}
    browser.cookie = cookie
    assert await browser.come_back(**brought) == {"error": "invalid_state"}


async def test_a_disabled_user(
    wrenn: Server, oauth: Settings, browsers: Browsers, clock: FakeClock
) -> None:
    account = await (await browsers.new()).login()
    database = Database(oauth.sql_url)
    async with database.write() as connection:
        await connection.execute(update(users).values(disabled_at=clock()))
    await database.close()
    assert await (await browsers.new()).login() == {"error": "access_denied"}
    bearer = {"Authorization": f"Bearer {account['token']}"}
    assert (await wrenn.client().get("/v1/api-keys", headers=bearer)).status_code == 401


@ON_SQLITE
async def test_states_that_are_refused(
    browsers: Browsers, oauth: Settings, hub: GitHub, clock: FakeClock
) -> None:
    browser, cookie, brought = await browsers.consented(hub)
    _, other_cookie, other_state = await browsers.departed()
    state, expiry, mac = cookie.split(".")
    attacks: dict[str, tuple[str | None, dict[str, str]]] = {
        "no cookie": (None, brought),
        "no state": (cookie, {"code": brought["code"]}),
        "an empty state": (cookie, {**brought, "state": ""}),
        "another state": (cookie, {**brought, "state": other_state}),
        "another cookie": (other_cookie, brought),
        "no mac": (state, brought),
        "another mac": (f"{state}.{expiry}.{'0' * 64}", brought),
        "a longer life": (f"{state}.{int(expiry) + 600}.{mac}", brought),
        "nonsense": ("nonsense", {**brought, "state": "nonsense"}),
    }
    for name, (kept, query) in attacks.items():
        attacker = await browsers.new()
        if kept is not None:
            attacker.cookie = kept
        assert await attacker.come_back(**query) == {"error": "invalid_state"}, name
    clock.advance(600)
    assert await browser.come_back(**brought) == {"error": "invalid_state"}
    assert hub.asked(TOKEN) == []
    assert await _count(oauth, "users") == [0]


@ON_SQLITE
async def test_a_state_of_another_provider(
    wrenn: Server, browsers: Browsers, hub: GitHub, clock: FakeClock
) -> None:
    secret = (wrenn.settings.data_dir / "jwt_secret").read_text()
    states = States(secret, clock=clock, random=lambda size: b"r" * size)
    for provider, end in (("gitlab", "invalid_state"), ("github", None)):
        issued = states.issue(provider)
        browser = await browsers.new()
        browser.cookie = issued.cookie
        query = {"state": issued.state, "code": hub.consent(issued.challenge)}
        assert (await browser.come_back(**query)).get("error") == end


async def test_a_state_counts_once(
    wrenn: Server, oauth: Settings, browsers: Browsers, hub: GitHub, clock: FakeClock
) -> None:
    """Also with the cookie kept, at another server and after a restart."""
    browser, cookie, brought = await browsers.consented(hub)
    assert "token" in await browser.come_back(**brought)
    assert browser.cookie is None
    verifier = hub.asked(TOKEN)[0].form["code_verifier"]
    for _ in range(2):
        async with serve(oauth, HostDouble(), clock) as other:
            again = await browsers.new(other)
            again.cookie = cookie
            query = {**brought, "code": hub.consent(challenge_of(verifier))}
            assert await again.come_back(**query) == {"error": "invalid_state"}
    assert len(hub.asked(TOKEN)) == 1


async def test_a_state_counts_once_among_ten_at_once(browsers: Browsers, hub: GitHub) -> None:
    browser, cookie, brought = await browsers.consented(hub)
    copies = [browser, *[await browsers.new() for _ in range(9)]]
    for copy in copies:
        copy.cookie = cookie
    ends = await asyncio.gather(*(copy.come_back(**brought) for copy in copies))
    assert [end.get("error") for end in ends].count("invalid_state") == 9
    assert sum("token" in end for end in ends) == 1


async def test_used_states_are_forgotten_in_time(
    oauth: Settings, browsers: Browsers, clock: FakeClock
) -> None:
    database = Database(oauth.sql_url)
    for kept in (1, 2, 1):
        await (await browsers.new()).login()
        async with database.read() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM spent_states")) == kept
        clock.advance(600 if kept == 1 else 1200)
    await database.close()


@ON_SQLITE
async def test_no_code(browsers: Browsers, hub: GitHub) -> None:
    for code in ({}, {"code": ""}):
        browser, _, state = await browsers.departed()
        assert await browser.come_back(state=state, **code) == {"error": "missing_code"}


@ON_SQLITE
async def test_a_code_that_github_does_not_take(browsers: Browsers, hub: GitHub) -> None:
    browser, _, brought = await browsers.consented(hub)
    refused = await browser.come_back(state=brought["state"], code="another")
    assert refused == {"error": "exchange_failed"}


@ON_SQLITE
async def test_a_code_of_another_login_fails_by_its_verifier(
    browsers: Browsers, oauth: Settings, hub: GitHub
) -> None:
    _, _, victim = await browsers.consented(hub)
    attacker, _, own = await browsers.consented(hub)
    injected = await attacker.come_back(state=own["state"], code=victim["code"])
    assert injected == {"error": "exchange_failed"}
    assert await _count(oauth, "users") == [0]


@ON_SQLITE
async def test_a_secret_that_github_does_not_take(
    hub: GitHub, host: HostDouble, tmp_path: Path, database_url: None
) -> None:
    settings = with_github(hub, tmp_path, database_url, oauth_github_client_secret="wrong")
    async with serve(settings, host) as server:
        browser = Browser(server.app)
        async with browser.client:
            assert await browser.login() == {"error": "exchange_failed"}


@pytest.mark.parametrize(
    "emails",
    [
        [],
        [Email("ada@example.com", verified=False)],
        [Email("ada@example.com", primary=False)],
        [Email("a@example.com", verified=False), Email("b@example.com", primary=False)],
        [Email("no address")],
        [Email("ada@example.com\r\nX-Injected: 1")],
        [Email("a" * 400 + "@example.com")],
    ],
)
@ON_SQLITE
async def test_no_verified_primary_email(
    browsers: Browsers, oauth: Settings, hub: GitHub, emails: list[Email]
) -> None:
    hub.person.emails = emails
    assert await (await browsers.new()).login() == {"error": "exchange_failed"}
    assert await _count(oauth, "users", "identities") == [0, 0]


async def test_the_email_of_another_account(
    wrenn: Server, oauth: Settings, browsers: Browsers, hub: GitHub
) -> None:
    body = {"email": "ada@example.com", "password": PASSWORD}
    assert (await wrenn.client().post("/v1/auth/signup", json=body)).status_code == 201
    for _ in range(2):
        assert await (await browsers.new()).login() == {"error": "email_taken"}
    assert await _count(oauth, "users", "identities") == [1, 0]
    assert (await wrenn.client().post("/v1/auth/login", json=body)).status_code == 200
    hub.person.emails = [Email("ada@other.example.com")]
    assert "token" in await (await browsers.new()).login()
    hub.person = replace(hub.person, id=1)
    assert await (await browsers.new()).login() == {"error": "email_taken"}


async def test_whatever_else_is_wrong(oauth: Settings, browsers: Browsers) -> None:
    await _change(oauth, "DROP TABLE identities")
    assert await (await browsers.new()).login() == {"error": "internal_error"}
    await _change(oauth, "DROP TABLE spent_states")
    assert await (await browsers.new()).login() == {"error": "internal_error"}


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
async def test_attempts_are_limited(
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
