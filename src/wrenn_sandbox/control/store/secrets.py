"""Secrets of teams: sealed, and found by their names."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import Row, Select, Text, delete, insert, select, type_coerce, update

from wrenn_sandbox.errors import AlreadyExists, Conflict, QuotaExceeded
from wrenn_sandbox.ids import SandboxId, SecretId, TeamId
from wrenn_sandbox.model.sandbox import ENDED, State
from wrenn_sandbox.model.secrets import PER_TEAM
from wrenn_sandbox.wire.messages import Egress

from .database import Database
from .quotas import QuotaTransaction
from .records import Position, Secret, newest_first, record, values
from .tables import sandboxes, secrets

_SHOWN = 3
"""How many sandboxes are named that use a secret."""


class TeamSecrets:
    """The secrets of one team; those of others do not exist here."""

    def __init__(self, database: Database, team_id: TeamId, guard: QuotaTransaction) -> None:
        self._database = database
        self._team_id = team_id
        self._guard = guard
        self._mine = secrets.c.team_id == team_id

    async def add(self, secret: Secret, sealed: bytes) -> Secret:
        """Raises `AlreadyExists` and `QuotaExceeded`."""
        added = replace(secret, sealed=sealed)
        names = select(secrets.c.name).where(self._mine)
        async with self._guard.write(self._team_id) as connection:
            known = (await connection.execute(names)).scalars().all()
            if secret.name in known:
                raise AlreadyExists(f"There is a secret {secret.name}; replace its value")
            if len(known) >= PER_TEAM:
                raise QuotaExceeded(
                    f"This team may have at most {PER_TEAM} secrets; delete one", limit="secrets"
                )
            await connection.execute(insert(secrets).values(values(added)))
        return added

    async def page(self, limit: int | None, after: Position | None) -> list[Secret]:
        query = newest_first(select(secrets).where(self._mine), secrets, limit, after)
        return await self._database.records(Secret, query)

    async def named(self, names: Collection[str]) -> list[Secret]:
        """Those of these names."""
        query = select(secrets).where(self._mine, secrets.c.name.in_(names))
        return await self._database.records(Secret, query)

    async def versions(self) -> dict[str, str]:
        """The versions of all, by name."""
        query = select(secrets.c.name, secrets.c.version).where(self._mine)
        return {row.name: row.version for row in await self._database.rows(query)}

    async def replace(
        self, secret_id: SecretId, sealed: bytes, version: str, at: datetime
    ) -> Secret | None:
        """Keep another value; None where the secret is gone."""
        query = update(secrets).where(self._mine, secrets.c.id == secret_id)
        query = query.values(sealed=sealed, version=version, updated_at=at)
        async with self._guard.write(self._team_id) as connection:
            row = (await connection.execute(query.returning(secrets))).one_or_none()
        return None if row is None else record(Secret, row)

    async def remove(self, secret: Secret) -> bool:
        """Whether there was such a secret; raises `Conflict` while sandboxes have rules for it."""
        query = delete(secrets).where(self._mine, secrets.c.id == secret.id)
        async with self._guard.write(self._team_id) as connection:
            found = (await connection.execute(self._using(secret.name))).all()
            users = _users(found, secret.name)
            if users:
                more = f" and {len(users) - _SHOWN} more" if len(users) > _SHOWN else ""
                raise Conflict(
                    f"The network policies of {', '.join(users[:_SHOWN])}{more} refer to this"
                    " secret; change them or delete the sandboxes first"
                )
            return (await connection.execute(query)).rowcount == 1

    async def users(self, name: str, states: Sequence[State]) -> list[SandboxId]:
        """The sandboxes in these states that have rules for a secret."""
        query = self._using(name).where(sandboxes.c.state.in_(states))
        return _users(await self._database.rows(query), name)

    def _using(self, name: str) -> Select[tuple[str, Egress]]:
        """All that may have rules for it: SQLite takes `KEY` for `key` here."""
        mine = (sandboxes.c.team_id == self._team_id) & sandboxes.c.state.not_in(ENDED)
        policy = type_coerce(sandboxes.c.network, Text)
        found = mine & policy.contains("{{secret:" + name + "}}", autoescape=True)
        query = select(sandboxes.c.id, sandboxes.c.network).where(found)
        return query.order_by(sandboxes.c.created_at)


class AllSecrets:
    """Secrets of every team, for the platform's own work."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def versions(self, teams: Collection[TeamId]) -> dict[TeamId, dict[str, str]]:
        """The versions of all secrets of these teams, by team and name."""
        columns = secrets.c.team_id, secrets.c.name, secrets.c.version
        query = select(*columns).where(secrets.c.team_id.in_(teams))
        found: dict[TeamId, dict[str, str]] = {}
        for row in await self._database.rows(query):
            found.setdefault(TeamId(row.team_id), {})[row.name] = row.version
        return found


def _users(found: Iterable[Row[*tuple[object, ...]]], name: str) -> list[SandboxId]:
    return [
        SandboxId(each.id)
        for each in found
        if any(rule.secret == name for rule in each.network.secrets)
    ]
