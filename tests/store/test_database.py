"""The database itself: its schema, its durability, its guards."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from support.api_server import Server, Team
from support.host_double import HostDouble
from support.postgres import PostgresServer
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.control.store.database import Database, DatabaseFault
from wrenn_sandbox.control.store.records import SandboxFilter
from wrenn_sandbox.control.store.sandboxes import Change, Missing
from wrenn_sandbox.control.store.tables import metadata
from wrenn_sandbox.ids import KeyId, SandboxId, TeamId
from wrenn_sandbox.model.sandbox import Event, IllegalTransition, State
from wrenn_sandbox.settings import Settings


def _differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"compare_type": False})
    return list(compare_metadata(context, metadata))


async def test_migrations_make_the_tables(settings: Settings) -> None:
    store, database = Store(settings.sql_url), Database(settings.sql_url)
    await store.open()
    async with database.read() as connection:
        assert await connection.run_sync(_differences) == []
    await database.close()
    await store.close()


async def test_servers_that_start_at_once_share_a_database(settings: Settings) -> None:
    stores = [Store(settings.sql_url) for _ in range(3)]
    await asyncio.gather(*(store.open() for store in stores))
    for store in stores:
        assert await store.all_sandboxes.count_by_status() == {}
        await store.close()


async def test_nobody_else_on_the_host_reads_an_sqlite_file(tmp_path: Path) -> None:
    file = tmp_path / "readable" / "wrenn.db"
    file.parent.mkdir(mode=0o755)
    file.touch(mode=0o644)
    database = Database(f"sqlite+aiosqlite:///{file}")
    await database.prepare()
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE secrets (each TEXT)"))
        found = {path.name: path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    await database.close()
    assert found == {"wrenn.db": 0o600, "wrenn.db-wal": 0o600, "wrenn.db-shm": 0o600}


async def test_a_cancelled_write_keeps_no_lock(tmp_path: Path) -> None:
    """Not even while somebody still has the error, and with it the cursor of the transaction."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'wrenn.db'}")
    await database.prepare()
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE numbers (each INTEGER)"))

    async def add() -> None:
        async with database.write() as connection:
            await connection.execute(text("INSERT INTO numbers VALUES (1) RETURNING each"))

    cancelled: list[BaseException | None] = []
    for turns in range(40):
        adding = asyncio.create_task(add())
        for _ in range(turns):
            await asyncio.sleep(0)
        adding.cancel()
        cancelled += await asyncio.gather(adding, return_exceptions=True)
        async with asyncio.timeout(5):
            await add()
    await database.close()
    assert any(isinstance(each, asyncio.CancelledError) for each in cancelled)


@pytest.mark.postgres
async def test_an_sslmode_as_in_libpq(postgres: PostgresServer, migrated: str) -> None:
    url = postgres.url(postgres.make_database(migrated)) + "&sslmode=prefer"
    store = Store(Settings(database_url=url).sql_url)
    await store.open()
    assert await store.all_sandboxes.count_by_status() == {}
    await store.close()


@pytest.mark.parametrize("database_url", [None])
async def test_sqlite_keeps_what_it_acknowledged(settings: Settings) -> None:
    database = Database(settings.sql_url)
    await database.prepare()
    for mode in (database.read, database.write):
        async with mode() as connection:
            for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
                assert await connection.scalar(text(f"PRAGMA {pragma}")) == value
    await database.close()
    assert settings.data_dir.stat().st_mode & 0o777 == 0o700


async def test_one_of_many_transitions_wins(faulty: Server, user: Team) -> None:
    id = SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])
    store = faulty.plane.store.all_sandboxes

    async def attempt(event: Event) -> bool:
        try:
            await store.apply(id, Change(event, "test", datetime.now(UTC)))
        except IllegalTransition:
            return False
        return True

    won = await asyncio.gather(
        *(attempt(event) for event in (Event.PAUSE, Event.SNAPSHOT) for _ in range(4))
    )
    assert sum(won) == 1
    sandbox = await store.get(id)
    assert sandbox is not None
    assert sandbox.state in (State.PAUSING, State.SNAPSHOTTING)


async def test_notes_of_many_sandboxes_do_not_lock_each_other_out(
    faulty: Server, user: Team
) -> None:
    answers = [await user.client.post("/v1/sandboxes") for _ in range(12)]
    ids = [SandboxId(answer.json()["id"]) for answer in answers]
    sandboxes = faulty.plane.store.all_sandboxes
    for second in range(8):
        at = datetime(2100, 1, 1, second=second, tzinfo=UTC)
        await asyncio.gather(
            sandboxes.touch(dict.fromkeys(ids, at)),
            sandboxes.note_disk(dict.fromkeys(reversed(ids), second)),
        )
    found = await sandboxes.in_states([State.RUNNING])
    assert {(each.last_active_at, each.disk_bytes) for each in found} == {(at, second)}


async def test_notes_of_many_keys_do_not_lock_each_other_out(server: Server, user: Team) -> None:
    answers = [
        await user.client.post("/v1/api-keys", json={"name": f"{each}"}, headers=user.bearer)
        for each in range(12)
    ]
    ids = [KeyId(answer.json()["id"]) for answer in answers]
    keys = server.plane.store.keys
    for second in range(8):
        at = datetime(2100, 1, 1, second=second, tzinfo=UTC)
        await asyncio.gather(
            keys.touch(dict.fromkeys(ids, at)), keys.touch(dict.fromkeys(reversed(ids), at))
        )
    listed = (await user.client.get("/v1/api-keys", headers=user.bearer)).json()
    assert {each["last_used"] for each in listed if each["id"] in ids} == {"2100-01-01T00:00:07Z"}


async def test_a_transition_that_is_not_legal_changes_nothing(faulty: Server, user: Team) -> None:
    id = SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])
    store = faulty.plane.store.all_sandboxes
    before = await store.get(id)
    events = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
    now = datetime.now(UTC)
    with pytest.raises(IllegalTransition):
        await store.apply(id, Change(Event.PAUSE, "test", now), Change(Event.RESUME, "test", now))
    assert await store.get(id) == before
    assert (await user.client.get(f"/v1/sandboxes/{id}/events")).json() == events
    with pytest.raises(Missing):
        await store.apply(SandboxId("sb-none"), Change(Event.PAUSE, "test", now))


async def test_a_teams_view_holds_nothing_of_another(faulty: Server, user: Team) -> None:
    """Also where routes have looked before."""
    id = SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])
    own, other = (
        faulty.plane.store.team(TeamId(each.team_id)).sandboxes
        for each in (user, await faulty.team())
    )
    assert await own.events(id, None, None)
    assert await other.events(id, None, None) == []
    assert await other.page(SandboxFilter(), None, None) == []
    assert (await other.get(id), await other.life(id)) == (None, None)


async def test_reasons_that_a_database_cannot_keep_are_cleaned(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])
    await host.exit(id, "guest said \0\ud800" + "x" * 5000)
    sandbox = (await user.client.get(f"/v1/sandboxes/{id}")).json()
    assert sandbox["reason"].startswith("guest said ?xxx")
    assert len(sandbox["reason"]) == 1000


@pytest.mark.parametrize("database_url", [None])
async def test_a_database_has_another_version_after_each_change(
    settings: Settings, database_url: None
) -> None:
    ours, another = Store(settings.sql_url), Store(settings.sql_url)
    await ours.open()
    await another.open()
    seen = {first := await ours.version()}
    await ours.all_sandboxes.count_by_status()
    assert await ours.version() == first
    for store in (ours, another):
        now = datetime.now(UTC)
        assert await store.spent_states.spend(f"a state of {id(store)}", now, now)
        seen.add(await ours.version())
    assert len(seen) == 3
    await ours.close()
    await another.close()


async def test_what_fails_is_told_by_its_kind(settings: Settings, tmp_path: Path) -> None:
    database = Database(settings.sql_url)
    faults: list[DatabaseFault] = []
    database.on_fault = faults.append
    with pytest.raises(DBAPIError):
        await database.rows(select(text("nothing")))
    table = metadata.tables["teams"]
    statement = insert(table).values(dict.fromkeys(table.c.keys()))
    store = Store(settings.sql_url)
    await store.open()
    with pytest.raises(IntegrityError):
        await database.change(statement)
    await store.close()
    await database.close()
    lost = Database(Settings(database_url=f"postgresql://wrenn@/x?host={tmp_path}").sql_url)
    lost.on_fault = faults.append
    with pytest.raises(OSError):
        await lost.rows(select(text("1")))
    await lost.close()
    assert faults == [DatabaseFault.OTHER, DatabaseFault.CONSTRAINT, DatabaseFault.CONNECTION]
