"""Sign-up, login and the tokens that they give."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest

from support.api_server import PASSWORD, FakeClock, Server, Team, make_settings, serve
from support.host_double import HostDouble
from wrenn_sandbox.settings import Settings


async def _signup(client: httpx2.AsyncClient, **body: object) -> httpx2.Response:
    return await client.post("/v1/auth/signup", json=body)


def _code(response: httpx2.Response) -> str:
    return str(response.json()["error"]["code"])


async def test_signup_makes_a_user_and_a_team(faulty: Server) -> None:
    answer = await _signup(faulty.client(), email="  Ada@Example.COM ", password=PASSWORD)
    assert answer.status_code == 201
    account = answer.json()
    assert account["email"] == "ada@example.com"
    assert account["user_id"].startswith("usr-")
    assert account["team_id"].startswith("team-")
    claims = jwt.decode(account["token"], options={"verify_signature": False})
    assert claims["sub"] == account["user_id"]
    assert claims["team_id"] == account["team_id"]
    assert claims["exp"] - claims["iat"] == 6 * 3600


async def test_login_gives_a_token_for_the_same_team(faulty: Server, user: Team) -> None:
    answer = await faulty.client().post(
        "/v1/auth/login", json={"email": user.email.upper(), "password": PASSWORD}
    )
    assert answer.status_code == 200
    assert (answer.json()["user_id"], answer.json()["team_id"]) == (user.user_id, user.team_id)


_BAD_LOGINS: list[tuple[str, str]] = [
    ("user0@example.com", "wrong password"),
    ("nobody@example.com", PASSWORD),
    ("not an email", PASSWORD),
    ("user0@example.com", "x" * 5000),
    ("nul\0@example.com", PASSWORD),
]


async def test_whatever_is_wrong_with_a_login_the_answer_is_the_same(
    faulty: Server, user: Team
) -> None:
    for email, password in _BAD_LOGINS:
        answer = await faulty.client().post(
            "/v1/auth/login", json={"email": email, "password": password}
        )
        assert answer.status_code == 401
        assert answer.json()["error"] == {
            "code": "unauthorized",
            "message": "Wrong email or password",
        }


async def test_an_email_can_be_registered_once(faulty: Server) -> None:
    client = faulty.client()
    answers = await asyncio.gather(
        *(_signup(client, email=email, password=PASSWORD) for email in ("a@b.com", "A@B.com"))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409]
    loser = next(answer for answer in answers if answer.status_code == 409)
    assert _code(loser) == "email_taken"


_BAD_SIGNUPS: list[tuple[dict[str, Any], str]] = [
    ({"password": PASSWORD}, "email"),
    ({"email": "a@b.com"}, "password"),
    ({"email": "a@b.com", "password": "short"}, "password"),
    ({"email": "a@b.com", "password": "x" * 1025}, "password"),
    ({"email": "no address", "password": PASSWORD}, "email"),
    ({"email": "a\0@b.com", "password": PASSWORD}, "email"),
    ({"email": 7, "password": PASSWORD}, "email"),
]


async def test_a_signup_that_is_not_acceptable(faulty: Server) -> None:
    for body, field in _BAD_SIGNUPS:
        answer = await _signup(faulty.client(), **body)
        assert answer.status_code == 400
        assert _code(answer) == "invalid_request"
        assert field in answer.json()["error"]["message"]


async def test_any_unicode_password_of_1024_characters(faulty: Server) -> None:
    client, password = faulty.client(), "\0𝕡é" + "ß" * 1021
    assert (await _signup(client, email="a@b.com", password=password)).status_code == 201
    for attempt, status in ((password, 200), (password[:-1], 401)):
        body = {"email": "a@b.com", "password": attempt}
        assert (await client.post("/v1/auth/login", json=body)).status_code == status


async def test_passwords_and_keys_are_kept_as_hashes(
    faulty: Server, user: Team, settings: Settings
) -> None:
    account = await faulty.plane.store.accounts.by_email(user.email)
    assert account is not None
    assert account.password_hash is not None
    assert account.password_hash.startswith("$argon2id$")
    if settings.database_url is None:
        content = b"".join(
            path.read_bytes() for path in await asyncio.to_thread(_database_files, settings)
        )
        assert user.email.encode() in content
        assert user.key.encode() not in content
        assert PASSWORD.encode() not in content


def _database_files(settings: Settings) -> list[Path]:
    return list(settings.data_dir.glob("wrenn.db*"))


async def _keys(client: httpx2.AsyncClient, header: str | None) -> int:
    headers = {} if header is None else {"Authorization": header}
    return (await client.get("/v1/api-keys", headers=headers)).status_code


async def test_which_authorization_headers_are_accepted(faulty: Server, user: Team) -> None:
    client = faulty.client()
    for good in (f"Bearer {user.token}", f"bearer {user.token}", f"BEARER  {user.token} "):
        assert await _keys(client, good) == 200
    for bad in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {user.token}",
        user.token,
        f"Bearer {user.key}",
        f"Bearer {user.token}x",
        "Bearer a.b.c",
        "Bearer " + "a" * 5000,
    ):
        assert await _keys(client, bad) == 401, bad


async def test_forged_tokens_are_refused(faulty: Server, user: Team) -> None:
    claims = jwt.decode(user.token, options={"verify_signature": False})
    secret = (faulty.settings.data_dir / "jwt_secret").read_text()
    for forged in (
        jwt.encode(claims, "x" * 64, algorithm="HS256"),
        jwt.encode(claims, "", algorithm="none"),
        jwt.encode(claims, secret, algorithm="HS512"),
        jwt.encode({**claims, "exp": claims["iat"] - 1}, secret),
        jwt.encode({**claims, "sub": "usr-nobody"}, secret),
        jwt.encode({**claims, "sub": "usr-" + "a" * 20}, secret),
        jwt.encode({**claims, "team_id": "team-" + "a" * 20}, secret),
        jwt.encode({key: value for key, value in claims.items() if key != "exp"}, secret),
    ):
        assert await _keys(faulty.client(), f"Bearer {forged}") == 401
    assert await _keys(faulty.client(), f"Bearer {jwt.encode(claims, secret)}") == 200


async def test_a_token_ends_after_six_hours(tmp_path: Path, host: HostDouble) -> None:
    clock = FakeClock()
    async with serve(make_settings(tmp_path, None), host, clock) as server:
        team = await server.team()
        clock.advance(6 * 3600 - 1)
        assert await _keys(server.client(), f"Bearer {team.token}") == 200
        clock.advance(1)
        assert await _keys(server.client(), f"Bearer {team.token}") == 401


async def test_the_secret_outlives_the_server(settings: Settings, host: HostDouble) -> None:
    async with serve(settings, host) as server:
        team = await server.team()
    path = settings.data_dir / "jwt_secret"
    assert path.stat().st_mode & 0o777 == 0o600
    async with serve(settings, host) as server:
        assert await _keys(server.client(), f"Bearer {team.token}") == 200


@pytest.mark.parametrize(
    ("limits", "who"),
    [
        ({"auth_attempts": "3/minute"}, "email"),
        ({"auth_attempts_per_address": "3/minute"}, "address"),
    ],
)
async def test_signups_and_logins_are_limited_in_number(
    tmp_path: Path, host: HostDouble, limits: dict[str, str], who: str
) -> None:
    async with serve(make_settings(tmp_path, None, **limits), host) as server:
        client = server.client()
        body = {"email": "a@b.com", "password": "wrong password"}
        statuses = [(await client.post("/v1/auth/login", json=body)).status_code for _ in range(4)]
        assert statuses == [401, 401, 401, 429]
        refused = await client.post("/v1/auth/login", json=body)
        assert _code(refused) == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        other = {"email": "other@b.com", "password": "wrong password"}
        expected = 401 if who == "email" else 429
        assert (await client.post("/v1/auth/login", json=other)).status_code == expected
