"""Servers for tests of the whole application, each on SQLite and on PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import structlog
from blockbuster import BlockBuster, blockbuster_ctx

from support.api_server import FakeClock, Server, Team, destroy_all, make_settings, serve
from support.browser import Browsers
from support.github import CALLBACK, GitHub, ada, github, with_github
from support.host_double import HostDouble
from support.postgres import PostgresServer
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.settings import Settings


@pytest.fixture
def no_blocking_calls() -> Iterator[BlockBuster]:
    """The control plane never blocks the event loop.

    Migrations run in a loop and a thread of their own; drivers make paths absolute
    and look for a password file when they begin.
    """
    with blockbuster_ctx("wrenn_sandbox.control") as blockbuster:
        for function in blockbuster.functions.values():
            function.can_block_in("store/migrate.py", {"_migrate", "_upgrade"})
            function.can_block_in("sqlite/pysqlite.py", "create_connect_args")
            function.can_block_in("asyncpg/connect_utils.py", "_parse_connect_dsn_and_args")
        yield blockbuster


@pytest.fixture
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def migrated(postgres: PostgresServer) -> str:
    """The name of a database with the newest schema, to make copies of."""
    name = postgres.make_database()
    asyncio.run(_migrate(postgres.url(name)))
    return name


async def _migrate(url: str) -> None:
    store = Store(Settings(database_url=url).sql_url)
    await store.open()
    await store.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """A new empty database; `None` is SQLite in the data directory."""
    if request.param == "sqlite":
        return None
    server = request.getfixturevalue("postgres")
    template = request.getfixturevalue("migrated")
    assert isinstance(server, PostgresServer)
    return server.url(server.make_database(template))


@pytest.fixture
def settings(tmp_path: Path, database_url: str | None) -> Settings:
    return make_settings(tmp_path / "data", database_url)


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Server]:
    """A server whose machines are processes on this machine."""
    host = await HostAgent.start(settings)
    try:
        async with serve(settings, host) as server:
            yield server
    finally:
        for report in await host.sandboxes():
            await host.destroy(report.sandbox_id, server.operation())
        await host.close()


@pytest.fixture
async def restartable(settings: Settings) -> AsyncIterator[Settings]:
    """Settings for servers that a test starts and stops; their sandboxes end with the test."""
    yield settings
    await destroy_all(settings)


@pytest.fixture
async def team(server: Server) -> Team:
    return await server.team()


@pytest.fixture
def host() -> HostDouble:
    return HostDouble()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def faulty(settings: Settings, host: HostDouble) -> AsyncIterator[Server]:
    """A server whose host fails when the test says so."""
    async with serve(settings, host) as server:
        yield server


@pytest.fixture
async def user(faulty: Server) -> Team:
    """A team of the server with the faulty host."""
    return await faulty.team()


@pytest.fixture
async def hub() -> AsyncIterator[GitHub]:
    """A GitHub of the tests' own, with Ada before it."""
    async with github(CALLBACK, ada()) as hub:
        yield hub


@pytest.fixture
def oauth(hub: GitHub, tmp_path: Path, database_url: str | None) -> Settings:
    """Settings of a server whose users may log in with `hub`."""
    return with_github(hub, tmp_path / "data", database_url)


@pytest.fixture
async def wrenn(oauth: Settings, host: HostDouble, clock: FakeClock) -> AsyncIterator[Server]:
    """That server."""
    async with serve(oauth, host, clock) as server:
        yield server


@pytest.fixture
async def browsers(wrenn: Server) -> AsyncIterator[Browsers]:
    async with AsyncExitStack() as stack:
        yield Browsers(wrenn, stack)
