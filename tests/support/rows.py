"""What is in the database, past the server."""

from sqlalchemy import func, select, table, text

from wrenn_sandbox.control.store.database import Database
from wrenn_sandbox.settings import Settings


async def count_rows(settings: Settings, *tables: str) -> list[int]:
    """How many rows each table has."""
    database = Database(settings.sql_url)
    async with database.read() as connection:
        counts = [
            (await connection.execute(select(func.count()).select_from(table(each)))).scalar_one()
            for each in tables
        ]
    await database.close()
    return counts


async def change(settings: Settings, statement: str) -> None:
    """Run a statement beside the server."""
    database = Database(settings.sql_url)
    async with database.write() as connection:
        await connection.execute(text(statement))
    await database.close()
