"""What operators do in the database beside a running server, and what the server makes of it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import jwt
import pytest
from sqlalchemy import Row, text
from websockets.exceptions import InvalidStatus

from support.api_server import PASSWORD, FakeClock, Server, Team, eventually, make_settings, serve
from support.host_double import HostDouble
from support.listening import listening
from support.postgres import PostgresServer
from support.rows import count_rows
from support.sockets import Peer, talking
from wrenn_sandbox.control.api.streams import session
from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.control.metrics import Metrics
from wrenn_sandbox.control.service import callers, draining, evacuation
from wrenn_sandbox.control.store.administration import Administration, administration
from wrenn_sandbox.control.store.database import Database
from wrenn_sandbox.control.store.records import Account, Query
from wrenn_sandbox.errors import Conflict, EmailTaken, HostFailure, InvalidRequest, NotFound
from wrenn_sandbox.ids import SandboxId, TeamId, UserId, new_team_id, new_user_id
from wrenn_sandbox.model.quota import QuotaOverride
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Phase

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server does every second or two it does at once."""
    for module in (callers, draining, evacuation):
        monkeypatch.setattr(module, "_INTERVAL", 0.02)


@pytest.fixture
async def admin(faulty: Server) -> AsyncIterator[Administration]:
    """An operator in the database of the server with the faulty host."""
    async with administration(faulty.settings.sql_url, "tester") as found:
        yield found


@pytest.fixture
async def port(faulty: Server) -> AsyncIterator[int]:
    async with listening(faulty.app) as port:
        yield port


async def _login(server: Server, email: str, password: str = PASSWORD) -> httpx2.Response:
    body = {"email": email, "password": password}
    return await server.client().post("/v1/auth/login", json=body)


async def _works(server: Server, **headers: str) -> bool:
    """Whether the credential in the headers opens the list of sandboxes."""
    answer = await server.client(headers).get("/v1/sandboxes")
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


async def _settled(server: Server, id: str) -> None:
    await eventually(lambda: not server.plane.operations.busy(SandboxId(id)))


async def _states(admin: Administration, state: State) -> None:
    """Wait until every sandbox is in this state."""
    for _ in range(500):
        if {each.state for each in await admin.sandboxes()} == {state}:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


async def _create(team: Team) -> str:
    answer = await team.client.post("/v1/sandboxes")
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _status(team: Team, id: str) -> str:
    return str((await team.client.get(f"/v1/sandboxes/{id}")).json()["status"])


async def _newest(team: Team, id: str, count: int = 2) -> list[tuple[str, str, str | None]]:
    events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    return [(each["event"], each["actor"], each.get("reason")) for each in events[:count]]


async def test_a_disabled_user_is_shut_out_at_once(
    faulty: Server, user: Team, admin: Administration
) -> None:
    other = await faulty.team()
    await admin.disable(await admin.user(f" {user.email.upper()} "), utc_now())
    refused = await _login(faulty, user.email)
    wrong = await _login(faulty, user.email, "something else")
    assert refused.status_code == wrong.status_code == 401
    assert refused.content == wrong.content
    assert not await _works(faulty, Authorization=f"Bearer {user.token}")
    assert not await _works(faulty, **{"X-API-Key": user.key})
    assert await _works(faulty, **{"X-API-Key": other.key})
    assert (await _login(faulty, other.email)).status_code == 200

    await admin.enable(UserId(user.user_id), utc_now())
    again = await _login(faulty, user.email)
    assert again.status_code == 200
    assert await _works(faulty, **{"X-API-Key": user.key})
    assert await _works(faulty, Authorization=f"Bearer {again.json()['token']}")
    assert not await _works(faulty, Authorization=f"Bearer {user.token}")


async def test_the_password_of_a_disabled_user_is_hashed_all_the_same(
    faulty: Server, user: Team, admin: Administration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the time tells nothing."""
    await admin.disable(UserId(user.user_id), utc_now())
    verified: list[str | None] = []
    verify = faulty.plane.passwords.verify

    async def watched(hashed: str | None, password: str) -> bool:
        verified.append(hashed)
        return await verify(hashed, password)

    monkeypatch.setattr(faulty.plane.passwords, "verify", watched)
    await _login(faulty, user.email)
    assert len(verified) == 1
    assert verified[0] is not None


async def test_revoked_tokens_and_new_ones_of_the_same_second(
    settings: Settings, host: HostDouble
) -> None:
    clock = FakeClock()
    async with (
        serve(settings, host, clock) as server,
        administration(settings.sql_url, "tester") as admin,
    ):
        team, other = await server.team(), await server.team()
        assert await admin.revoke_tokens(UserId(team.user_id), clock()) == 1
        assert not await _works(server, Authorization=f"Bearer {team.token}")
        assert await _works(server, Authorization=f"Bearer {other.token}")
        assert await _works(server, **{"X-API-Key": team.key})
        token = (await _login(server, team.email)).json()["token"]
        assert await _works(server, Authorization=f"Bearer {token}")
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims["iat"] == int(clock().timestamp()) + 1
        assert claims["exp"] - claims["iat"] == 6 * 3600
        clock.advance(60)
        assert await admin.revoke_tokens(None, clock()) == 2
        for each in (token, other.token):
            assert not await _works(server, Authorization=f"Bearer {each}")


async def test_a_login_with_the_old_password_while_a_new_one_is_set(
    settings: Settings, host: HostDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked and fits, then the password changes, then the token is made: worth nothing."""
    clock = FakeClock()
    async with (
        serve(settings, host, clock) as server,
        administration(settings.sql_url, "tester") as admin,
    ):
        team = await server.team()
        hashed = await server.plane.passwords.hash("another one")
        verify = server.plane.passwords.verify

        async def slow(hash: str | None, password: str) -> bool:
            fits = await verify(hash, password)
            await admin.set_password(UserId(team.user_id), hashed, clock())
            clock.advance(5)
            return fits

        with monkeypatch.context() as patch:
            patch.setattr(server.plane.passwords, "verify", slow)
            answer = await _login(server, team.email)
        assert answer.status_code == 200
        old = answer.json()["token"]
        assert not await _works(server, Authorization=f"Bearer {old}")
        assert (await _login(server, team.email)).status_code == 401
        new = (await _login(server, team.email, "another one")).json()["token"]
        assert await _works(server, Authorization=f"Bearer {new}")


async def test_an_email_is_made_once(
    faulty: Server, user: Team, admin: Administration, settings: Settings
) -> None:
    hashed = await faulty.plane.passwords.hash(PASSWORD)

    def account(email: str) -> Account:
        return Account(new_user_id(), new_team_id(), email, hashed)

    with pytest.raises(EmailTaken):
        await admin.create_user(account(user.email), utc_now())
    assert await count_rows(settings, "users", "teams", "admin_actions") == [1, 1, 0]
    made = await asyncio.gather(
        *(admin.create_user(account("new@example.com"), utc_now()) for _ in range(3)),
        return_exceptions=True,
    )
    assert [type(each) for each in made].count(EmailTaken) == 2
    assert await count_rows(settings, "users", "teams", "admin_actions") == [2, 2, 1]
    assert (await _login(faulty, "new@example.com")).status_code == 200


async def test_a_leaked_key_by_whatever_is_known_of_it(
    faulty: Server, admin: Administration
) -> None:
    for known in ("id", "prefix", "shown", "part", "key"):
        team = await faulty.team()
        (row,) = (await team.client.get("/v1/api-keys", headers=team.bearer)).json()
        which = {
            "id": row["id"],
            "prefix": team.key[:12],
            "shown": row["key_prefix"],
            "part": team.key[:20],
            "key": team.key,
        }[known]
        found = await admin.find_key(which)
        assert found.id == row["id"]
        assert await _works(faulty, **{"X-API-Key": team.key})
        await admin.revoke_key(found.id, utc_now())
        assert not await _works(faulty, **{"X-API-Key": team.key})
        with pytest.raises(NotFound):
            await admin.find_key(which)


async def test_words_that_cannot_name_a_key_are_refused(
    faulty: Server, user: Team, admin: Administration, settings: Settings
) -> None:
    for vague in ("", "wrn_", user.key[:11], "key-", "x" * 36, "%", "wrn_%%%%%%%"):
        with pytest.raises(InvalidRequest):
            await admin.find_key(vague)
    with pytest.raises(NotFound):
        await admin.find_key("wrn_" + "0" * 32)
    twin = await faulty.team()
    database = Database(settings.sql_url)
    async with database.write() as connection:
        await connection.execute(
            text("UPDATE api_keys SET key_prefix = :prefix"), {"prefix": user.key[:12] + "..."}
        )
    await database.close()
    with pytest.raises(Conflict, match="key-"):
        await admin.find_key(user.key[:12])
    assert (await admin.find_key(twin.key)).team_id == twin.team_id


async def test_revoking_all_keys_of_a_team_shuts_it_out(
    faulty: Server, user: Team, admin: Administration
) -> None:
    other = await faulty.team()
    await user.client.post("/v1/api-keys", json={}, headers=user.bearer)
    assert await admin.revoke_keys(await admin.team(user.team_id), utc_now()) == 2
    assert not await _works(faulty, **{"X-API-Key": user.key})
    assert await _works(faulty, **{"X-API-Key": other.key})
    with pytest.raises(NotFound):
        await admin.team("team-of-nobody")


@pytest.mark.parametrize("credential", ["key", "token"])
@pytest.mark.parametrize("route", ["exec/stream", "pty"])
async def test_open_connections_end_with_their_credential(
    server: Server, team: Team, credential: str, route: str
) -> None:
    other = await server.team()
    async with (
        administration(server.settings.sql_url, "tester") as admin,
        listening(server.app) as port,
    ):
        url = f"ws://127.0.0.1:{port}/v1/sandboxes"
        mine, theirs = f"{url}/{await _create(team)}", f"{url}/{await _create(other)}"
        key, headers = (team.key, {}) if credential == "key" else (None, team.bearer)
        async with (
            talking(f"{mine}/{route}", key, **headers) as peer,
            talking(f"{theirs}/{route}", other.key) as stranger,
        ):
            for each in (peer, stranger):
                await each.say(type="start", cmd="cat")
                assert (await each.hear())["type"] in ("start", "started")
            await server.plane.revocations.sweep()
            if credential == "key":
                await admin.revoke_key((await admin.find_key(team.key)).id, utc_now())
            else:
                await admin.revoke_tokens(UserId(team.user_id), utc_now())
            last = (await peer.rest())[-1]
            assert last["type"] == "error"
            assert peer.closed_with[0] == 4401
            await stranger.say(type="stdin", data="still\n") if route == "exec/stream" else None
            await _is_open(stranger)
        with pytest.raises(InvalidStatus) as refused:
            async with talking(f"{mine}/{route}", key, **headers):
                pass
        assert refused.value.response.status_code == 401


@pytest.mark.parametrize("route", ["exec/stream", "pty"])
@pytest.mark.parametrize("database_url", [None])
async def test_a_waiting_connection_cannot_start_without_its_credential(
    server: Server, team: Team, route: str
) -> None:
    """A command on a terminal would run on when its client is turned out."""
    async with (
        administration(server.settings.sql_url, "tester") as admin,
        listening(server.app) as port,
    ):
        id = await _create(team)
        url = f"ws://127.0.0.1:{port}/v1/sandboxes/{id}/{route}"
        async with talking(url, team.key) as peer:
            await admin.revoke_key((await admin.find_key(team.key)).id, utc_now())
            await server.plane.revocations.sweep()
            await peer.say(type="start", cmd="sleep", args=["7659"])
            (frame,) = await peer.rest()
            assert (frame["type"], frame["code"]) == ("error", "unauthorized")
            assert peer.closed_with[0] == 4401
        listed = await server.client(team.bearer).get(f"/v1/sandboxes/{id}/processes")
        assert listed.json() == {"processes": []}


async def _is_open(peer: Peer) -> None:
    await (await peer.connection.ping())


async def test_a_client_that_does_not_read_is_turned_out_too(
    server: Server, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FAREWELL_SECONDS", 0.1)
    monkeypatch.setattr(session, "TERM_SECONDS", 0.1)
    async with (
        administration(server.settings.sql_url, "tester") as admin,
        listening(server.app) as port,
    ):
        id = await _create(team)
        url = f"ws://127.0.0.1:{port}/v1/sandboxes/{id}/exec/stream"
        async with talking(url, team.key) as peer:
            await peer.say(type="start", cmd="yes")
            await peer.hear()
            peer.connection.transport.pause_reading()
            await admin.revoke_key((await admin.find_key(team.key)).id, utc_now())
            await eventually(lambda: not server.plane.revocations._open, 15)
            peer.connection.transport.abort()


async def test_sandboxes_do_not_run_on_for_nobody(
    faulty: Server, user: Team, admin: Administration, host: HostDouble
) -> None:
    """The server notices by itself."""
    other = await faulty.team()
    mine, theirs = await _create(user), await _create(other)
    await admin.disable(UserId(user.user_id), utc_now())
    await eventually(lambda: host.phases[SandboxId(mine)] is Phase.PAUSED)
    assert await _status(other, theirs) == "running"
    await _settled(faulty, mine)
    await admin.enable(UserId(user.user_id), utc_now())
    reason = "every user of its team is disabled"
    assert await _newest(user, mine) == [("paused", "admin", None), ("pause", "admin", reason)]
    assert (await user.client.post(f"/v1/sandboxes/{mine}/resume")).status_code == 200


async def test_a_team_with_somebody_left_runs_on(
    faulty: Server, user: Team, admin: Administration, settings: Settings
) -> None:
    colleague = await faulty.team()
    database = Database(settings.sql_url)
    async with database.write() as connection:
        await connection.execute(
            text("UPDATE memberships SET team_id = :team WHERE user_id = :user"),
            {"team": user.team_id, "user": colleague.user_id},
        )
    await database.close()
    id = await _create(user)
    await admin.disable(UserId(user.user_id), utc_now())
    await faulty.plane.evacuation.sweep()
    assert await _status(user, id) == "running"
    assert not await _works(faulty, Authorization=f"Bearer {user.token}")
    await admin.disable(UserId(colleague.user_id), utc_now())
    await _states(admin, State.PAUSED)


async def test_a_draining_server_starts_nothing_new_and_pauses_in_turn(
    faulty: Server, user: Team, admin: Administration
) -> None:
    """Within a second or two nothing starts and what runs is paused, by itself."""
    running, paused = await _create(user), await _create(user)
    await user.client.post(f"/v1/sandboxes/{paused}/pause")
    assert (await faulty.client().get("/health")).json()["draining"] is False
    await admin.drain(True, utc_now())
    await _states(admin, State.PAUSED)
    reason = "the server is being drained"
    assert await _newest(user, running) == [("paused", "admin", None), ("pause", "admin", reason)]
    for path, state in (("", None), (f"/{paused}/resume", "paused"), (f"/{running}/resume", None)):
        refused = await user.client.post(f"/v1/sandboxes{path}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity"), state
        assert "drained" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
    assert await _status(user, paused) == "paused"
    assert (await faulty.client().get("/health")).json() == {
        **(await faulty.client().get("/health")).json(),
        "status": "ok",
        "draining": True,
    }
    assert "wrenn_draining 1.0" in (await faulty.client().get("/metrics")).text
    await admin.drain(False, utc_now())
    await eventually(lambda: faulty.plane.draining.since is None)
    assert (await user.client.post(f"/v1/sandboxes/{running}/resume")).status_code == 200
    assert await _create(user)


async def test_a_sandbox_that_cannot_be_paused_runs_on_while_draining(
    settings: Settings, host: HostDouble
) -> None:
    clock = FakeClock()
    async with (
        serve(settings, host, clock) as server,
        administration(settings.sql_url, "tester") as admin,
    ):
        team = await server.team()
        ids = [await _create(team) for _ in range(3)]
        host.fail["pause"] = HostFailure("The disk is full")
        await admin.drain(True, clock())
        await eventually(lambda: all(("pause", id) in host.calls for id in ids))
        for id in ids:
            await _settled(server, id)
        assert {each.id for each in await admin.busy()} == set(ids)
        assert {each.reason for each in await admin.busy()} == {"The disk is full"}
        assert (await _newest(team, ids[0], 1)) == [("pause_failed", "admin", "The disk is full")]
        del host.fail["pause"]
        await server.plane.evacuation.sweep()
        assert [host.calls.count(("pause", id)) for id in ids] == [1, 1, 1]
        assert (await team.client.delete(f"/v1/sandboxes/{ids.pop()}")).status_code == 204
        clock.advance(60)
        await eventually(lambda: all(host.calls.count(("pause", id)) == 2 for id in ids))
        for id in ids:
            await _settled(server, id)
            assert await _status(team, id) == "paused"


async def test_a_create_under_way_is_paused_once_it_runs(
    faulty: Server, user: Team, host: HostDouble, admin: Administration
) -> None:
    gate = host.hold("create")
    create = faulty.start(user.client.post("/v1/sandboxes"))
    await gate.arrived.wait()
    await admin.drain(True, utc_now())
    await eventually(lambda: faulty.plane.draining.since is not None)
    await faulty.plane.evacuation.sweep()
    assert [each.state for each in await admin.busy()] == ["starting"]
    gate.opened.set()
    assert (await create).status_code == 201
    await _states(admin, State.PAUSED)


async def test_draining_outlives_the_server(settings: Settings, host: HostDouble) -> None:
    async with serve(settings, host) as server:
        team = await server.team()
    async with administration(settings.sql_url, "tester") as admin:
        await admin.drain(True, utc_now())
        since = await admin.draining_since()
        await admin.drain(True, utc_now())
        assert since is not None
        assert await admin.draining_since() == since
    async with serve(settings, host) as server:
        answer = await server.client({"X-API-Key": team.key}).post("/v1/sandboxes")
        assert answer.status_code == 503


async def test_what_an_operator_sees(
    faulty: Server, user: Team, admin: Administration, settings: Settings
) -> None:
    other = await faulty.team()
    id = await _create(user)
    database = Database(settings.sql_url)
    async with database.write() as connection:
        await connection.execute(
            text(
                "INSERT INTO identities (provider, subject, user_id, created_at) "
                "VALUES ('github', '1', :user, CURRENT_TIMESTAMP)"
            ),
            {"user": other.user_id},
        )
    await database.close()
    users = {each.email: each for each in await admin.users()}
    assert users.keys() == {user.email, other.email}
    assert users[user.email].login == ["password"]
    assert users[other.email].login == ["password", "github"]
    assert users[user.email].team_id == user.team_id
    team = next(each for each in await admin.teams() if each.id == user.team_id)
    assert (team.members, team.keys, team.running, team.paused) == (1, 1, 1, 0)
    keys = await admin.keys(TeamId(user.team_id))
    assert [key.key_prefix for key in keys] == [user.key[:12] + "..."]
    assert [each.id for each in await admin.sandboxes()] == [id]
    assert await admin.sandboxes([State.PAUSED]) == []
    assert await admin.sandboxes(team_id=TeamId(other.team_id)) == []


async def test_a_quota_of_a_teams_own(user: Team, admin: Administration) -> None:
    team_id = TeamId(user.team_id)
    assert await admin.quota(team_id) == QuotaOverride()
    await admin.set_quota(team_id, QuotaOverride(running=1), utc_now())
    assert await admin.quota(team_id) == QuotaOverride(running=1)
    await admin.set_quota(team_id, QuotaOverride(), utc_now())
    assert (await admin.teams())[0].quota is None


async def test_every_change_leaves_a_row(user: Team, admin: Administration) -> None:
    user_id, team_id = UserId(user.user_id), TeamId(user.team_id)
    await admin.disable(user_id, utc_now())
    await admin.enable(user_id, utc_now())
    await admin.revoke_tokens(None, utc_now())
    await admin.revoke_keys(team_id, utc_now())
    await admin.set_quota(team_id, QuotaOverride(running=2), utc_now())
    await admin.drain(True, utc_now())
    await admin.drain(False, utc_now())
    actions = await admin.actions(100)
    assert {each.operator for each in actions} == {"tester"}
    assert [(each.action, each.subject) for each in reversed(actions)] == [
        ("disable-user", user_id),
        ("enable-user", user_id),
        ("revoke-tokens", "all"),
        ("revoke-keys", team_id),
        ("set-quota", f'{team_id} {{"running":2}}'),
        ("drain", ""),
        ("drain --off", ""),
    ]
    assert len(await admin.actions(2)) == 2


@pytest.mark.postgres
async def test_a_database_that_is_not_a_servers(
    tmp_path: Path, postgres: PostgresServer, settings: Settings, host: HostDouble
) -> None:
    empty = tmp_path / "empty.db"
    empty.touch()
    nowhere = make_settings(tmp_path / "nowhere", None).sql_url
    for url in (
        nowhere,
        f"sqlite+aiosqlite:///{empty}",
        make_settings(tmp_path, postgres.url(postgres.make_database())).sql_url,
    ):
        with pytest.raises(NotFound, match="DATABASE_URL"):
            async with administration(url, "tester"):
                pass
    assert not (tmp_path / "nowhere").exists()
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"no database at all" * 1000)
    for url in (
        f"sqlite+aiosqlite:///{damaged}",
        make_settings(tmp_path, postgres.url("nonexistent")).sql_url,
        make_settings(tmp_path, "postgresql://wrenn@127.0.0.1:1/wrenn").sql_url,
    ):
        with pytest.raises(HostFailure) as caught:
            async with administration(url, "tester"):
                pass
        assert caught.value.detail
    async with serve(settings, host):
        pass
    database = Database(settings.sql_url)
    async with database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    await database.close()
    with pytest.raises(Conflict, match="0001"):
        async with administration(settings.sql_url, "tester"):
            pass


@pytest.mark.parametrize("database_url", [None])
async def test_a_server_asks_a_database_that_does_not_change_for_nothing(
    faulty: Server, admin: Administration, monkeypatch: pytest.MonkeyPatch, database_url: None
) -> None:
    asked: list[str] = []
    row, rows = Database.row, Database.rows

    async def noted_row(database: Database, query: Query) -> Row[*tuple[object, ...]] | None:
        asked.append(str(query))
        return await row(database, query)

    async def noted_rows(database: Database, query: Query) -> list[Row[*tuple[object, ...]]]:
        asked.append(str(query))
        return await rows(database, query)

    monkeypatch.setattr(Database, "row", noted_row)
    monkeypatch.setattr(Database, "rows", noted_rows)
    own = draining.Draining(faulty.plane.store, Metrics())
    for _ in range(3):
        await own.refresh()
        await faulty.plane.evacuation.sweep()
    assert [each for each in asked if "draining_since" in each]
    asked.clear()
    await own.refresh()
    await faulty.plane.evacuation.sweep()
    assert [each for each in asked if "draining_since" in each or "memberships" in each] == []
    await admin.drain(True, utc_now())
    await own.refresh()
    assert own.since is not None
