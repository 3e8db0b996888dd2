"""Users, their teams and memberships."""

from datetime import datetime

from sqlalchemy import ColumnElement, exists, insert, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.errors import EmailTaken
from wrenn_sandbox.ids import TeamId, UserId

from .database import Database
from .records import Account, Identity, values
from .tables import identities, memberships, teams, users

_ACCOUNT = select(
    users.c.id.label("user_id"),
    memberships.c.team_id,
    users.c.email,
    users.c.password_hash,
    users.c.disabled_at,
    users.c.tokens_not_before,
).join_from(users, memberships, memberships.c.user_id == users.c.id)


async def add_account(connection: AsyncConnection, account: Account, now: datetime) -> None:
    """Add user, team and owner membership; raises `IntegrityError` where the email is known."""
    await connection.execute(
        insert(users).values(
            id=account.user_id,
            email=account.email,
            password_hash=account.password_hash,
            created_at=now,
        )
    )
    await connection.execute(
        insert(teams).values(id=account.team_id, name=f"{account.email}'s Team", created_at=now)
    )
    await connection.execute(
        insert(memberships).values(
            user_id=account.user_id, team_id=account.team_id, role="owner", created_at=now
        )
    )


class Accounts:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, account: Account, now: datetime, identity: Identity | None = None
    ) -> None:
        """Add user, team and owner membership at once; raises `EmailTaken`.

        With `identity` that is the user's too; the error then also means that it has an account.
        """
        try:
            async with self._database.write() as connection:
                await add_account(connection, account, now)
                if identity is not None:
                    await connection.execute(
                        insert(identities).values(
                            user_id=account.user_id, created_at=now, **values(identity)
                        )
                    )
        except IntegrityError as error:
            raise EmailTaken("This email is already registered; log in instead") from error

    async def by_email(self, email: str) -> Account | None:
        """The account of an email with the first team that it joined."""
        return await self._first(users.c.email == email)

    async def by_identity(self, identity: Identity) -> Account | None:
        """The account of a provider's user with the first team that it joined."""
        user = select(identities.c.user_id).where(
            identities.c.provider == identity.provider,
            identities.c.subject == identity.subject,
        )
        return await self._first(users.c.id == user.scalar_subquery())

    async def _first(self, condition: ColumnElement[bool]) -> Account | None:
        query = _ACCOUNT.where(condition).order_by(memberships.c.created_at).limit(1)
        return await self._database.record(Account, query)

    async def may_act(self, user_id: UserId, team_id: TeamId, issued_at: datetime) -> bool:
        """Whether a token of this time counts.

        The user exists, is not disabled, still belongs to the team, and no later time was set
        before which tokens do not count.
        """
        query = (
            select(memberships.c.role)
            .join_from(memberships, users, users.c.id == memberships.c.user_id)
            .where(
                memberships.c.user_id == user_id,
                memberships.c.team_id == team_id,
                users.c.disabled_at.is_(None),
                or_(users.c.tokens_not_before.is_(None), users.c.tokens_not_before <= issued_at),
            )
        )
        return await self._database.row(query) is not None


def has_somebody(team_id: ColumnElement[str]) -> ColumnElement[bool]:
    """The condition that somebody in the team of this column is not disabled."""
    return exists().where(
        memberships.c.team_id == team_id,
        users.c.id == memberships.c.user_id,
        users.c.disabled_at.is_(None),
    )
