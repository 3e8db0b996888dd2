"""A database that a server has made and that this version of the code can work with."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from wrenn_sandbox.errors import Conflict, NotFound

from .administration import Administration
from .database import UNUSABLE, Database, unusable
from .migrate import newest_revision, revision_of

_NONE = (
    "There is no database of a server here: set WRENN_DATA_DIR and DATABASE_URL as for "
    "wrenn serve, which makes it at its first start"
)


@asynccontextmanager
async def administration(url: str, operator: str) -> AsyncIterator[Administration]:
    """The administration of the database of this URL, which is neither made nor migrated.

    Raises `NotFound` where there is none, `Conflict` where it is another version's, and
    `HostFailure` where it can not be used.
    """
    database = Database(url)
    try:
        if not await asyncio.to_thread(lambda: database.exists):
            raise NotFound(_NONE)
        await _check(database)
        yield Administration(database, operator)
    except UNUSABLE as error:
        raise unusable(error) from error
    finally:
        await database.close()


async def _check(database: Database) -> None:
    async with database.read() as connection:
        found = await connection.run_sync(revision_of)
    wanted = await asyncio.to_thread(newest_revision)
    if found is None:
        raise NotFound(_NONE)
    if found != wanted:
        raise Conflict(
            f"The database is another version's (it has {found}, this one works with {wanted}): "
            "use the version that serves it, or start this one's server once"
        )
