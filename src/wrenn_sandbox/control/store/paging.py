"""Keyset paging of lists that are sorted newest first."""

from sqlalchemy import Select, Table, and_, or_

from .records import Position


def newest_first(
    query: Select[*tuple[object, ...]], table: Table, limit: int | None, after: Position | None
) -> Select[*tuple[object, ...]]:
    """`query` sorted by `created_at` and `id` of `table`, newest first, from `after` on."""
    created_at, key = table.c.created_at, table.c.id
    query = query.order_by(created_at.desc(), key.desc())
    if after is not None:
        query = query.where(
            or_(created_at < after.at, and_(created_at == after.at, key < after.key))
        )
    return query if limit is None else query.limit(limit)
