"""What an operator sees and changes, across all teams; each change leaves a row behind.

Used by `wrenn admin` beside a running server, which finds changes in the database as it needs
them and is told nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    UpdateBase,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.errors import Conflict, EmailTaken, InvalidRequest, NotFound
from wrenn_sandbox.ids import (
    API_KEY,
    KeyId,
    TeamId,
    UserId,
    api_key_digest,
    api_key_prefix,
    is_id,
)
from wrenn_sandbox.model.quota import QuotaOverride, decode_override, encode_override
from wrenn_sandbox.model.sandbox import IN_FLIGHT, State

from .accounts import add_account
from .api_keys import remove_keys
from .database import UNUSABLE, Database, unusable
from .installation import Installation
from .migrate import newest_revision, revision_of
from .overview import ActionRow, KeyRow, SandboxRow, TeamRow, UserRow
from .quotas import lock_team
from .records import Account
from .tables import (
    UtcDateTime,
    admin_actions,
    api_keys,
    identities,
    installation,
    memberships,
    sandboxes,
    teams,
    users,
)

_PREFIX_LENGTH = len("wrn_") + 8
_BUSY = [State.RUNNING, *IN_FLIGHT]


class Administration:
    """`operator` is who is noted as the one who did it."""

    def __init__(self, database: Database, operator: str) -> None:
        self._database = database
        self._operator = operator

    async def users(self) -> list[UserRow]:
        """All users with their teams, newest first."""
        query = (
            select(users, memberships.c.team_id)
            .join_from(users, memberships, memberships.c.user_id == users.c.id, isouter=True)
            .order_by(users.c.created_at.desc(), users.c.id, memberships.c.created_at)
        )
        providers: dict[str, list[str]] = {}
        for identity in await self._database.rows(
            select(identities.c.user_id, identities.c.provider)
        ):
            providers.setdefault(identity.user_id, []).append(identity.provider)
        return [
            UserRow(
                row.email,
                row.id,
                row.team_id,
                row.created_at,
                row.disabled_at,
                [
                    *(["password"] if row.password_hash is not None else []),
                    *sorted(providers.get(row.id, [])),
                ],
            )
            for row in await self._database.rows(query)
        ]

    async def teams(self) -> list[TeamRow]:
        """All teams with what they have, newest first."""
        members = _count(memberships.c.team_id)
        keys = _count(api_keys.c.team_id)
        running = _count(sandboxes.c.team_id, sandboxes.c.state.in_(_BUSY))
        paused = _count(sandboxes.c.team_id, sandboxes.c.state == State.PAUSED)
        query = select(
            teams,
            members.label("members"),
            keys.label("keys"),
            running.label("running"),
            paused.label("paused"),
        ).order_by(teams.c.created_at.desc(), teams.c.id)
        return await self._database.records(TeamRow, query)

    async def keys(self, team_id: TeamId | None = None) -> list[KeyRow]:
        """API keys, newest first, without what would let anyone use them."""
        query = select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
        if team_id is not None:
            query = query.where(api_keys.c.team_id == team_id)
        return await self._database.records(KeyRow, query)

    async def sandboxes(
        self, states: Sequence[State] = (), team_id: TeamId | None = None
    ) -> list[SandboxRow]:
        """Sandboxes in these states, or in any, newest first."""
        query = select(sandboxes).order_by(sandboxes.c.created_at.desc(), sandboxes.c.id)
        if states:
            query = query.where(sandboxes.c.state.in_(states))
        if team_id is not None:
            query = query.where(sandboxes.c.team_id == team_id)
        return await self._database.records(SandboxRow, query)

    async def busy(self) -> list[SandboxRow]:
        """What keeps the machine from being switched off: sandboxes that run or are in flight."""
        return await self.sandboxes(_BUSY)

    async def user(self, who: str) -> UserId:
        """The user of an email or id; raises `NotFound`."""
        wanted = users.c.id == who if is_id("usr", who) else users.c.email == who.strip().lower()
        rows = await self._database.rows(select(users.c.id).where(wanted))
        if not rows:
            raise NotFound(f"There is no user {who}")
        return UserId(rows[0].id)

    async def team(self, which: str) -> TeamId:
        """The team of this id; raises `NotFound`."""
        if not await self._database.rows(select(teams.c.id).where(teams.c.id == which)):
            raise NotFound(f"There is no team {which}; wrenn admin teams lists them")
        return TeamId(which)

    async def create_user(self, account: Account, now: datetime) -> None:
        """Add a user with a team of their own, as sign-up does; raises `EmailTaken`."""
        try:
            async with self._database.write() as connection:
                await add_account(connection, account, now)
                await self._note(connection, now, "create-user", account.user_id)
        except IntegrityError as error:
            raise EmailTaken(f"There is a user {account.email} already") from error

    async def set_password(self, user_id: UserId, password_hash: str, now: datetime) -> None:
        """The user logs in with this password, and no token issued until now counts."""
        changed = {"password_hash": password_hash, "tokens_not_before": _next_second(now)}
        query = update(users).where(users.c.id == user_id).values(changed)
        await self._change(now, "set-password", user_id, query)

    async def disable(self, user_id: UserId, now: datetime) -> None:
        """The user cannot log in, and no token that they have counts, now or later."""
        since = func.coalesce(users.c.disabled_at, _time(now))
        changed = {"disabled_at": since, "tokens_not_before": _next_second(now)}
        query = update(users).where(users.c.id == user_id).values(changed)
        await self._change(now, "disable-user", user_id, query)

    async def enable(self, user_id: UserId, now: datetime) -> None:
        """The user can log in again; older tokens stay as they are."""
        query = update(users).where(users.c.id == user_id).values(disabled_at=None)
        await self._change(now, "enable-user", user_id, query)

    async def revoke_tokens(self, user_id: UserId | None, now: datetime) -> int:
        """No token issued until now counts, of one user or of all; gives how many users."""
        query = update(users).values(tokens_not_before=_next_second(now))
        if user_id is not None:
            query = query.where(users.c.id == user_id)
        return await self._change(now, "revoke-tokens", user_id or "all", query)

    async def find_key(self, which: str) -> KeyRow:
        """A key by its id, by itself, or by its beginning as a listing or a scan shows it.

        Raises `NotFound`, `InvalidRequest` for what cannot name a key, and `Conflict` where the
        beginning is that of several.
        """
        found = await self._database.records(KeyRow, select(api_keys).where(_names_key(which)))
        if not found:
            raise NotFound("There is no such API key: it has been deleted, or is another server's")
        if len(found) > 1:
            ids = ", ".join(key.id for key in found)
            raise Conflict(f"Several API keys begin like this; name one by its id: {ids}")
        return found[0]

    async def revoke_key(self, key_id: KeyId, now: datetime) -> None:
        """The key stops working at once."""
        query = select(api_keys.c.team_id).where(api_keys.c.id == key_id)
        for row in await self._database.rows(query):
            team_id = TeamId(row.team_id)
            await self._revoke(team_id, now, "revoke-key", key_id, api_keys.c.id == key_id)

    async def revoke_keys(self, team_id: TeamId, now: datetime) -> int:
        """All keys of a team stop working at once; gives how many."""
        return await self._revoke(team_id, now, "revoke-keys", team_id)

    async def _revoke(
        self,
        team_id: TeamId,
        now: datetime,
        action: str,
        subject: str,
        *conditions: ColumnElement[bool],
    ) -> int:
        async with self._database.write() as connection:
            await lock_team(connection, team_id)
            removed = await remove_keys(connection, team_id, now, "admin", *conditions)
            await self._note(connection, now, action, subject)
        return removed

    async def quota(self, team_id: TeamId) -> QuotaOverride:
        """What is different for this team; raises `BadQuota`."""
        text = (await self._database.rows(select(teams.c.quota).where(teams.c.id == team_id)))[
            0
        ].quota
        return QuotaOverride() if text is None else decode_override(text)

    async def set_quota(self, team_id: TeamId, quota: QuotaOverride, now: datetime) -> None:
        """Replace what is different for this team; what it has beyond its limits stays."""
        text = None if quota == QuotaOverride() else encode_override(quota)
        query = update(teams).where(teams.c.id == team_id).values(quota=text)
        await self._change(now, "set-quota", f"{team_id} {text or 'as every team'}", query)

    async def drain(self, on: bool, now: datetime) -> None:
        """Let the server take nothing new and pause what runs, or stop doing so."""
        since = func.coalesce(installation.c.draining_since, _time(now)) if on else None
        async with self._database.write() as connection:
            result = await connection.execute(update(installation).values(draining_since=since))
            if result.rowcount == 0:
                raise NotFound("No server has ever used this database; there is nothing to drain")
            await self._note(connection, now, "drain" if on else "drain --off", "")

    async def draining_since(self) -> datetime | None:
        return await Installation(self._database).draining_since()

    async def actions(self, limit: int) -> list[ActionRow]:
        """What operators did, newest first."""
        query = select(admin_actions).order_by(admin_actions.c.number.desc()).limit(limit)
        return await self._database.records(ActionRow, query)

    async def _change(self, now: datetime, action: str, subject: str, statement: UpdateBase) -> int:
        """Change rows and note it; gives how many."""
        async with self._database.write() as connection:
            result = await connection.execute(statement)
            await self._note(connection, now, action, subject)
        return result.rowcount

    async def _note(
        self, connection: AsyncConnection, now: datetime, action: str, subject: str
    ) -> None:
        await connection.execute(
            insert(admin_actions).values(
                at=now, operator=self._operator[:64], action=action, subject=subject
            )
        )


def _count(team_id: ColumnElement[str], *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    return (
        select(func.count())
        .where(team_id == teams.c.id, *conditions)
        .correlate(teams)
        .scalar_subquery()
    )


def _names_key(which: str) -> ColumnElement[bool]:
    if is_id("key", which):
        return api_keys.c.id == which
    if API_KEY.fullmatch(which):
        return api_keys.c.digest == api_key_digest(which)
    beginning = which.removesuffix("...")
    if beginning.startswith("wrn_") and len(beginning) >= _PREFIX_LENGTH:
        return api_keys.c.key_prefix == api_key_prefix(beginning)
    raise InvalidRequest(
        "Give the id of an API key, the key itself, or its first twelve characters"
    )


def _time(at: datetime) -> BindParameter[datetime]:
    return literal(at, UtcDateTime)


def _next_second(now: datetime) -> datetime:
    """Tokens carry whole seconds: those of this second are old ones."""
    return now.replace(microsecond=0) + timedelta(seconds=1)


_NONE = (
    "There is no database of a server here: set WRENN_DATA_DIR and DATABASE_URL as for "
    "wrenn serve, which makes it at its first start"
)


@asynccontextmanager
async def administration(url: str, operator: str) -> AsyncIterator[Administration]:
    """The administration of the database of this URL, which is neither made nor migrated.

    Raises `NotFound` where there is none, `Conflict` where it is another version's, and
    `HostFailure` where it cannot be used.
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
