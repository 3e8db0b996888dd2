"""Requests with an idempotency key, and what was answered to them."""

from dataclasses import replace
from datetime import datetime

from sqlalchemy import ColumnElement, and_, delete, insert, select, update

from wrenn_sandbox.model.limits import IDEMPOTENCY_KEYS_KEPT

from .database import Database
from .records import KeyedRequest, record, values
from .tables import idempotency_keys


def _this(request: KeyedRequest) -> ColumnElement[bool]:
    row = idempotency_keys.c
    return and_(
        row.team_id == request.team_id,
        row.operation == request.operation,
        row.key == request.key,
    )


class IdempotencyKeys:
    """Of each team the newest `IDEMPOTENCY_KEYS_KEPT`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, request: KeyedRequest, not_before: datetime) -> KeyedRequest:
        """The request that came with this key since `not_before`; this one where none did."""
        row = idempotency_keys.c
        mine = row.team_id == request.team_id
        oldest_kept = (
            select(row.created_at)
            .where(mine)
            .order_by(row.created_at.desc())
            .offset(IDEMPOTENCY_KEYS_KEPT - 1)
            .limit(1)
            .scalar_subquery()
        )
        async with self._database.write() as connection:
            known = select(idempotency_keys).where(_this(request), row.created_at >= not_before)
            found = (await connection.execute(known)).one_or_none()
            if found is not None:
                return record(KeyedRequest, found)
            await connection.execute(delete(idempotency_keys).where(_this(request)))
            await connection.execute(
                delete(idempotency_keys).where(mine, row.created_at <= oldest_kept)
            )
            await connection.execute(insert(idempotency_keys).values(values(request)))
        return request

    async def complete(self, request: KeyedRequest, answer: str) -> KeyedRequest:
        """Remember the answer to a request."""
        await self._database.change(
            update(idempotency_keys).where(_this(request)).values(answer=answer)
        )
        return replace(request, answer=answer)

    async def forget(self, request: KeyedRequest) -> None:
        """Let the next request with this key be the first."""
        await self._database.change(delete(idempotency_keys).where(_this(request)))

    async def remove_old(self, before: datetime) -> int:
        """Remove the requests that came before `before`."""
        old = idempotency_keys.c.created_at < before
        return await self._database.change(delete(idempotency_keys).where(old))
