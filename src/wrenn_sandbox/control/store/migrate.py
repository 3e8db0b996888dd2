"""Bring a database to the newest schema, under a lock, in a thread with a loop of its own."""

import asyncio
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from .database import Database, sqlite_writer

_LOCK = 0x7772656E6E
_SCRIPTS = Path(__file__).parent / "migrations"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def newest_revision() -> str | None:
    """The schema that this version of the code works with; blocks."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def revision_of(connection: Connection) -> str | None:
    """The schema of a database; None where it has none."""
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _migrate(url: str, is_sqlite: bool) -> None:
    engine = sqlite_writer(url) if is_sqlite else create_async_engine(url)
    try:
        async with engine.begin() as connection:
            if not is_sqlite:
                await connection.execute(
                    text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK}
                )
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


async def migrate(database: Database) -> None:
    """Run all outstanding migrations in one transaction.

    Two servers that start at once run them one after the other: SQLite's write lock and a
    PostgreSQL advisory lock see to it.
    """
    await asyncio.to_thread(asyncio.run, _migrate(database.url, database.is_sqlite))
