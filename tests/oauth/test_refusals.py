"""Logins with GitHub that come to nothing, each by its real cause."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from sqlalchemy import text, update

from support.api_server import PASSWORD, FakeClock, Server, serve
from support.browser import Browser, Browsers
from support.github import (
    TOKEN,
    Email,
    GitHub,
    challenge_of,
    with_github,
)
from support.host_double import HostDouble
from support.rows import change, count_rows
from wrenn_sandbox.control.oauth.state import States
from wrenn_sandbox.control.store.database import Database
from wrenn_sandbox.control.store.tables import users
from wrenn_sandbox.settings import Settings

ON_SQLITE = pytest.mark.parametrize("database_url", [None])


@ON_SQLITE
async def test_the_user_declines(browsers: Browsers, oauth: Settings, hub: GitHub) -> None:
    hub.declines = True
    assert await (await browsers.new()).login() == {"error": "access_denied"}
    assert hub.asked(TOKEN) == []
    assert await count_rows(oauth, "users") == [0]


@ON_SQLITE
async def test_a_refusal_needs_no_state_but_uses_it_up(browsers: Browsers, hub: GitHub) -> None:
    stranger = await browsers.new()
    with structlog.testing.capture_logs() as logs:
        for error in ("access_denied", "Nobody\n\x1b[2J", "nobody" * 20):
            assert await stranger.come_back(error=error) == {"error": "access_denied"}
    assert "nobody" not in repr(logs).lower()
    browser, cookie, brought = await browsers.consented()
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
    browser, cookie, brought = await browsers.consented()
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
    assert await count_rows(oauth, "users") == [0]


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
    browser, cookie, brought = await browsers.consented()
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
    browser, cookie, brought = await browsers.consented()
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
async def test_a_callback_without_a_code_is_refused(browsers: Browsers, hub: GitHub) -> None:
    for code in ({}, {"code": ""}):
        browser, _, state = await browsers.departed()
        assert await browser.come_back(state=state, **code) == {"error": "missing_code"}


@ON_SQLITE
async def test_a_code_that_github_does_not_take(browsers: Browsers, hub: GitHub) -> None:
    browser, _, brought = await browsers.consented()
    refused = await browser.come_back(state=brought["state"], code="another")
    assert refused == {"error": "exchange_failed"}


@ON_SQLITE
async def test_a_code_of_another_login_fails_by_its_verifier(
    browsers: Browsers, oauth: Settings, hub: GitHub
) -> None:
    _, _, victim = await browsers.consented()
    attacker, _, own = await browsers.consented()
    injected = await attacker.come_back(state=own["state"], code=victim["code"])
    assert injected == {"error": "exchange_failed"}
    assert await count_rows(oauth, "users") == [0]


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
    assert await count_rows(oauth, "users", "identities") == [0, 0]


async def test_the_email_of_another_account(
    wrenn: Server, oauth: Settings, browsers: Browsers, hub: GitHub
) -> None:
    body = {"email": "ada@example.com", "password": PASSWORD}
    assert (await wrenn.client().post("/v1/auth/signup", json=body)).status_code == 201
    for _ in range(2):
        assert await (await browsers.new()).login() == {"error": "email_taken"}
    assert await count_rows(oauth, "users", "identities") == [1, 0]
    assert (await wrenn.client().post("/v1/auth/login", json=body)).status_code == 200
    hub.person.emails = [Email("ada@other.example.com")]
    assert "token" in await (await browsers.new()).login()
    hub.person = replace(hub.person, id=1)
    assert await (await browsers.new()).login() == {"error": "email_taken"}


async def test_any_other_wrong_callback_is_refused(oauth: Settings, browsers: Browsers) -> None:
    await change(oauth, "DROP TABLE identities")
    assert await (await browsers.new()).login() == {"error": "internal_error"}
    await change(oauth, "DROP TABLE spent_states")
    assert await (await browsers.new()).login() == {"error": "internal_error"}
