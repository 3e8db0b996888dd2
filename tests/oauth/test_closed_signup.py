"""A server whose operator makes all accounts: `WRENN_SIGNUP=closed`."""

import io
import sys
from pathlib import Path

import pytest

from support.api_server import PASSWORD, make_settings, serve
from support.browser import Browser, Browsers
from support.github import Email, GitHub, Person
from support.host_double import HostDouble
from support.live import live_server
from support.rows import count_rows
from wrenn_sandbox.cli.main import main
from wrenn_sandbox.settings import Settings

ON_SQLITE = pytest.mark.parametrize("database_url", [None])
_REFUSAL = {
    "code": "forbidden",
    "message": "Sign-up is closed here; ask whoever runs this server for an account",
}


def _closed(settings: Settings) -> Settings:
    return settings.model_copy(update={"signup": "closed"})


async def test_whoever_signs_up_is_told_the_same(
    settings: Settings, host: HostDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(settings, host) as server:
        known = (await server.team()).email
    async with serve(_closed(settings), host) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.plane.passwords, "hash", None)
            for email, password in (
                (known, PASSWORD),
                (known, "something else"),
                ("new@example.com", PASSWORD),
                ("no address", PASSWORD),
            ):
                body = {"email": email, "password": password}
                refused = await server.client().post("/v1/auth/signup", json=body)
                assert refused.status_code == 403
                assert refused.json() == {"error": _REFUSAL}
        body = {"email": known, "password": PASSWORD}
        assert (await server.client().post("/v1/auth/login", json=body)).status_code == 200
        document = (await server.client().get("/openapi.json")).json()
        assert "403" in document["paths"]["/v1/auth/signup"]["post"]["responses"]
    assert await count_rows(settings, "users", "teams", "memberships") == [1, 1, 1]


async def test_attempts_are_limited_all_the_same(tmp_path: Path, host: HostDouble) -> None:
    limited = make_settings(tmp_path, None, signup="closed", auth_attempts_per_address="3/minute")
    async with serve(limited, host) as server:
        body = {"email": "new@example.com", "password": PASSWORD}
        answers = [await server.client().post("/v1/auth/signup", json=body) for _ in range(4)]
    assert [each.status_code for each in answers] == [403, 403, 403, 429]


@ON_SQLITE
async def test_a_provider_lets_in_those_who_have_an_account(
    browsers: Browsers, hub: GitHub, oauth: Settings, host: HostDouble
) -> None:
    ada = await (await browsers.new()).login()
    async with serve(_closed(oauth), host) as server:

        async def login() -> dict[str, str]:
            browser = Browser(server.app)
            async with browser.client:
                return await browser.login()

        assert (await login())["user_id"] == ada["user_id"]
        for email in ("ada@example.com", "grace@example.com"):
            hub.person = Person(9020, "grace", [Email(email)])
            assert await login() == {"error": "access_denied"}
    assert await count_rows(oauth, "users", "identities") == [1, 1]


def test_the_command_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(tmp_path / "data", None, signup="closed")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PASSWORD}\n"))
    with live_server(settings, HostDouble()) as url:
        arguments = ["login", "--url", url, "--signup", "--email", "new@example.com"]
        monkeypatch.setattr(sys, "argv", ["wrenn", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == f"wrenn: {_REFUSAL['message']}"
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "config").exists()
