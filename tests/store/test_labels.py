"""How databases find sandboxes by their labels."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import ClauseElement, insert, text

from wrenn_sandbox.control.store import Store
from wrenn_sandbox.control.store.database import Database
from wrenn_sandbox.control.store.quotas import QuotaTransaction
from wrenn_sandbox.control.store.records import Query, Record, SandboxFilter
from wrenn_sandbox.control.store.sandboxes import TeamSandboxes
from wrenn_sandbox.control.store.tables import sandbox_labels, sandboxes, teams
from wrenn_sandbox.ids import TeamId
from wrenn_sandbox.model.quota import NO_LIMITS
from wrenn_sandbox.settings import Settings

_TEAM = TeamId("team-a")
_ROWS = 3000
_BORN = datetime(2026, 1, 1, tzinfo=UTC)


class _Explaining(Database):
    """Says how it would carry out a query, in the place of its rows."""

    plan = ""

    async def records(self, kind: type[Record], query: Query) -> list[Record]:
        assert isinstance(query, ClauseElement)
        dialect = self._reader.dialect
        statement = query.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
        explain = "EXPLAIN QUERY PLAN" if self.is_sqlite else "EXPLAIN"
        async with self.read() as connection:
            rows = await connection.exec_driver_sql(f"{explain} {statement}")
            self.plan = "\n".join(str(row[-1]) for row in rows)
        return []


async def _fill(database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(insert(teams).values(id=_TEAM, name="a", created_at=_BORN))
        rows = [
            {
                "id": f"sb-{n}",
                "team_id": _TEAM,
                "state": "running",
                "status": "running",
                "template": "minimal",
                "image_id": "img-1",
                "vcpus": 1,
                "memory_mb": 512,
                "timeout_sec": 0,
                "created_at": _BORN + timedelta(seconds=n),
                "last_updated": _BORN,
            }
            for n in range(_ROWS)
        ]
        await connection.execute(insert(sandboxes), rows)
        labels = [
            {"sandbox_id": f"sb-{n}", "team_id": _TEAM, "key": key, "value": value}
            for n in range(_ROWS)
            for key, value in (("run", str(n)), ("app", str(n % 3)))
        ]
        await connection.execute(insert(sandbox_labels), labels)
        await connection.execute(text("ANALYZE"))


@pytest.mark.parametrize("limit", [None, 50])
async def test_sandboxes_are_found_by_an_index_of_labels(
    settings: Settings, limit: int | None
) -> None:
    store, database = Store(settings.sql_url), _Explaining(settings.sql_url)
    await store.open()
    await _fill(database)
    wanted = SandboxFilter(labels=[("run", "77"), ("app", "2")])
    guard = QuotaTransaction(database, NO_LIMITS)
    await TeamSandboxes(database, _TEAM, guard).page(wanted, limit, None)
    await database.close()
    await store.close()
    assert "sandbox_labels_by_value" in database.plan
    for scan in ("SCAN sandboxes", "Seq Scan on sandboxes", "SCAN sandbox_labels"):
        assert scan not in database.plan
