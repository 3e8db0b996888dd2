"""Connections to the database: `read()` without a transaction, `write()` within one.

SQLite runs in WAL mode with `synchronous=FULL`, so that a committed write survives a power cut.
Its writes go one after the other through one connection that begins with `BEGIN IMMEDIATE`: no
transaction can fail half-way because another one got the write lock first.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Self

from asyncpg import PostgresConnectionError, PostgresError
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    UpdateBase,
    delete,
    event,
    make_url,
    or_,
    select,
    update,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from wrenn_sandbox.errors import HostFailure

from .records import Query, Record, record

UNUSABLE = (DBAPIError, PostgresError, OSError)
"""What is raised where a database cannot be reached, opened or trusted."""

_BUSY_TIMEOUT_MS = 10_000
_RETRY_SEC = 0.01
_PRAGMAS = (
    f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
)


class DatabaseFault(StrEnum):
    """Why work on a database failed."""

    CONNECTION = "connection"
    """It cannot be reached."""
    CONSTRAINT = "constraint"
    """It would break a rule of the tables: two wanted the same thing at once."""
    OTHER = "other"

    @classmethod
    def of(cls, error: Exception) -> Self:
        """`error` is one of `UNUSABLE`."""
        if isinstance(error, IntegrityError):
            return cls.CONSTRAINT
        if isinstance(error, OSError | InterfaceError | PostgresConnectionError):
            return cls.CONNECTION
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        return cls.CONNECTION if lost else cls.OTHER


def unusable(error: Exception) -> HostFailure:
    """One of `UNUSABLE` in the words of an operator."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    return HostFailure("The database cannot be used", detail=str(cause))


def _prepare_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _make_wal(file: Path) -> None:
    """Make a database that its owner alone may read, and switch it to WAL; blocks.

    SQLite does not wait for its busy timeout there, so servers that start at once would fail.
    What it keeps beside the file gets the file's permissions.
    """
    file.touch(mode=0o600)
    file.chmod(0o600)
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    with closing(sqlite3.connect(file)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SEC)
            else:
                return


class _Connection(sqlite3.Connection):
    """Ends its transaction when it is closed.

    SQLite puts that off as long as a statement is unfinished. The cursor of a cancelled task may
    live on in its error: until that is freed, nobody else could write.
    """

    def close(self) -> None:
        with suppress(sqlite3.ProgrammingError):
            self.rollback()
        super().close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def sqlite_writer(url: str) -> AsyncEngine:
    """An engine with one connection whose transactions take the write lock at once."""
    engine = create_async_engine(
        url,
        connect_args={"factory": _Connection},
        hide_parameters=True,
        pool_size=1,
        max_overflow=0,
    )
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_immediate)
    return engine


def _sqlite_reader(url: str) -> AsyncEngine:
    engine = create_async_engine(
        url,
        hide_parameters=True,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        pool_size=4,
    )
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    return engine


async def keep_newest(
    connection: AsyncConnection, table: Table, mine: ColumnElement[bool], kept: int
) -> None:
    """Of the rows that `mine` means, keep the `kept` with the highest `number`."""
    number = table.c.number
    oldest_kept = (
        select(number).where(mine).order_by(number.desc()).offset(kept - 1).limit(1)
    ).scalar_subquery()
    await connection.execute(delete(table).where(mine, number < oldest_kept))


class Database:
    """One database by its SQLAlchemy URL; opens connections as they are needed."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.url = url
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self._file = Path(parsed.database) if self.is_sqlite and parsed.database else None
        if self.is_sqlite:
            self._writer = sqlite_writer(url)
            self._reader = _sqlite_reader(url)
        else:
            self._writer = create_async_engine(
                url, hide_parameters=True, pool_pre_ping=True, pool_size=10
            )
            self._reader = self._writer.execution_options(isolation_level="AUTOCOMMIT")
        self.on_fault: Callable[[DatabaseFault], None] = lambda _: None
        """Told of each piece of work that fails."""
        self._turn = asyncio.Lock()
        self._observer: sqlite3.Connection | None = None

    @property
    def exists(self) -> bool:
        """Whether there is an SQLite file; blocks. Of a server's database only it can tell."""
        return self._file is None or self._file.is_file()

    async def prepare(self) -> None:
        """Make an SQLite file in WAL mode, readable by its owner alone."""
        if self._file is not None:
            directory = self._file.parent
            await asyncio.to_thread(directory.mkdir, mode=0o700, parents=True, exist_ok=True)
            await asyncio.to_thread(_make_wal, self._file)

    async def version(self) -> int | None:
        """A number that is another one after each change of an SQLite database, whoever made it.

        None where there is no such number: a change must be looked for then.
        """
        return None if self._file is None else await asyncio.to_thread(self._data_version)

    def _data_version(self) -> int:
        """What other connections than this one, which changes nothing, have committed; blocks."""
        if self._observer is None:
            assert self._file is not None
            self._observer = sqlite3.connect(self._file, check_same_thread=False)
        (number,) = self._observer.execute("PRAGMA data_version").fetchone()
        return int(number)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for queries, each a transaction of its own."""
        with self._watched():
            async with self._reader.connect() as connection:
                yield connection

    async def rows(self, query: Query) -> list[Row[*tuple[object, ...]]]:
        """What one query finds."""
        async with self.read() as connection:
            return list(await connection.execute(query))

    async def row(self, query: Query) -> Row[*tuple[object, ...]] | None:
        """The row of a query that finds one at most."""
        async with self.read() as connection:
            return (await connection.execute(query)).one_or_none()

    async def records(self, kind: type[Record], query: Query) -> list[Record]:
        """The same as records of a `kind`."""
        return [record(kind, row) for row in await self.rows(query)]

    async def record(self, kind: type[Record], query: Query) -> Record | None:
        """The same as a record of a `kind`."""
        row = await self.row(query)
        return None if row is None else record(kind, row)

    async def change(self, statement: UpdateBase) -> int:
        """Carry out one statement in a transaction of its own; returns how many rows it met."""
        async with self.write() as connection:
            return (await connection.execute(statement)).rowcount

    async def move_forward(
        self, table: Table, column: str, times: Iterable[tuple[str, datetime]]
    ) -> None:
        """Set a time in the rows of these ids, in each that has an earlier one or none.

        Rows are locked in the order of their ids, so that two such calls wait for each other once.
        """
        time = table.c[column]
        async with self.write() as connection:
            for key, at in sorted(times):
                earlier = or_(time.is_(None), time < at)
                query = update(table).where(table.c.id == key, earlier).values({column: at})
                await connection.execute(query)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: committed at the end of the block, rolled back when it raises."""
        with self._watched():
            if self.is_sqlite:
                async with self._turn, self._writer.begin() as connection:
                    yield connection
            else:
                async with self._writer.begin() as connection:
                    yield connection

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except UNUSABLE as error:
            self.on_fault(DatabaseFault.of(error))
            raise

    async def close(self) -> None:
        if self._observer is not None:
            await asyncio.to_thread(self._observer.close)
            self._observer = None
        await self._reader.dispose()
        await self._writer.dispose()
