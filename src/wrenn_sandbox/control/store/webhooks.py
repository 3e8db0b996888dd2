"""Webhooks: what each wants to be told, and how far it has come.

`position` is the number of the last event of the team that is settled for a webhook: delivered,
failed for good or not wanted. It moves when that is so and not before: what a server had not
settled when it ended is tried again.

Who delivers claims the webhook for a moment, so that two servers of one database do not both
deliver. A claim that nobody gives back runs out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, case, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wrenn_sandbox.errors import QuotaExceeded
from wrenn_sandbox.ids import TeamId, WebhookId
from wrenn_sandbox.model.webhooks import DELIVERIES_KEPT, PER_TEAM

from .accounts import has_somebody
from .database import Database, keep_newest
from .quotas import QuotaTransaction
from .records import Delivery, Position, Webhook, newest_first, record, values
from .tables import teams, webhook_deliveries, webhooks

CLAIM: Final = timedelta(seconds=30)
"""Longer than one delivery takes."""


@dataclass(frozen=True, slots=True)
class WebhookCounts:
    """How many webhooks, and the events of their teams that are not settled for them yet."""

    count: int
    backlog: int


class TeamWebhooks:
    """The webhooks of one team; those of others do not exist here."""

    def __init__(self, database: Database, team_id: TeamId, guard: QuotaTransaction) -> None:
        self._database = database
        self._team_id = team_id
        self._guard = guard
        self._mine = webhooks.c.team_id == team_id

    async def add(self, webhook: Webhook) -> Webhook:
        """Add a webhook that is told of what happens from now on; raises `QuotaExceeded`."""
        count = select(func.count()).select_from(webhooks).where(self._mine)
        last = select(teams.c.last_event).where(teams.c.id == self._team_id)
        async with self._guard.write(self._team_id) as connection:
            if (await connection.execute(count)).scalar_one() >= PER_TEAM:
                raise QuotaExceeded(
                    f"This team may have at most {PER_TEAM} webhooks; delete one", limit="webhooks"
                )
            position = (await connection.execute(last)).scalar_one()
            added = replace(webhook, position=position)
            await connection.execute(insert(webhooks).values(values(added)))
        return added

    async def get(self, webhook_id: WebhookId) -> Webhook | None:
        return await self._database.record(Webhook, select(webhooks).where(self._this(webhook_id)))

    async def page(self, limit: int | None, after: Position | None) -> list[Webhook]:
        query = newest_first(select(webhooks).where(self._mine), webhooks, limit, after)
        return await self._database.records(Webhook, query)

    async def change(self, webhook_id: WebhookId, changed: Mapping[str, object]) -> Webhook | None:
        """Change these columns; the delivery that failed last is tried again at once."""
        again = {"attempts": 0, "trying_since": None, "retry_at": None, "failing_since": None}
        query = update(webhooks).where(self._this(webhook_id)).values({**again, **changed})
        async with self._guard.write(self._team_id) as connection:
            row = (await connection.execute(query.returning(webhooks))).one_or_none()
        return None if row is None else record(Webhook, row)

    async def remove(self, webhook_id: WebhookId) -> bool:
        """Whether there was such a webhook."""
        return await self._database.change(delete(webhooks).where(self._this(webhook_id))) == 1

    async def deliveries(
        self, webhook_id: WebhookId, limit: int | None, before: int | None
    ) -> list[Delivery]:
        """The last deliveries, newest first, below the number `before`."""
        query = (
            select(webhook_deliveries)
            .join_from(webhook_deliveries, webhooks)
            .where(self._this(webhook_id))
            .order_by(webhook_deliveries.c.number.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(webhook_deliveries.c.number < before)
        return await self._database.records(Delivery, query)

    def _this(self, webhook_id: WebhookId) -> ColumnElement[bool]:
        return (webhooks.c.id == webhook_id) & self._mine


class AllWebhooks:
    """Webhooks of every team: for those who deliver."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def due(self, now: datetime, per_team: int) -> list[Webhook]:
        """Some webhooks of each team for which there may be something to deliver.

        By lot, and in no order: none is always behind others that are due again and again.
        """
        place = func.row_number().over(partition_by=webhooks.c.team_id, order_by=func.random())
        waiting = (
            select(webhooks.c.id, place.label("place"))
            .join_from(webhooks, teams)
            .where(webhooks.c.position < teams.c.last_event, *_free(now))
            .subquery()
        )
        some = select(waiting.c.id).where(waiting.c.place <= per_team)
        return await self._database.records(
            Webhook, select(webhooks).where(webhooks.c.id.in_(some)).order_by(func.random())
        )

    async def summary(self) -> dict[str, WebhookCounts]:
        """How many webhooks are `active`, `failing` and `disabled`, and what is not settled."""
        state = case(
            (webhooks.c.disabled_at.is_not(None), "disabled"),
            (webhooks.c.failing_since.is_not(None), "failing"),
            else_="active",
        ).label("state")
        query = (
            select(
                state,
                func.count().label("webhooks"),
                func.sum(teams.c.last_event - webhooks.c.position).label("backlog"),
            )
            .join_from(webhooks, teams)
            .where(has_somebody(webhooks.c.team_id))
            .group_by(state)
        )
        found = dict.fromkeys(("active", "failing", "disabled"), WebhookCounts(0, 0))
        for row in await self._database.rows(query):
            found[row.state] = WebhookCounts(row.webhooks, int(row.backlog))
        return found

    async def claim(self, webhook_id: WebhookId, now: datetime) -> Webhook | None:
        """The webhook, to deliver to for a moment; None where that is not possible now."""
        query = (
            update(webhooks)
            .where(webhooks.c.id == webhook_id, *_free(now))
            .values(claimed_until=now + CLAIM)
            .returning(webhooks)
        )
        async with self._database.write() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else record(Webhook, row)

    async def settle(
        self, webhook: Webhook, delivery: Delivery | None, changed: Mapping[str, object]
    ) -> Webhook | None:
        """Note a delivery, and what follows of it for the webhook.

        Gives the webhook as it is then; None where it has been deleted, or changed meanwhile by
        its team, whose change counts, or by somebody who delivers too.
        """
        query = (
            update(webhooks)
            .where(
                webhooks.c.id == webhook.id,
                webhooks.c.position == webhook.position,
                webhooks.c.attempts == webhook.attempts,
            )
            .values(changed)
            .returning(webhooks)
        )
        async with self._database.write() as connection:
            row = (await connection.execute(query)).one_or_none()
            if row is not None and delivery is not None:
                await _note(connection, delivery)
        return None if row is None else record(Webhook, row)

    async def release(self, webhook_id: WebhookId) -> None:
        """Give a claim back."""
        free = update(webhooks).where(webhooks.c.id == webhook_id).values(claimed_until=None)
        await self._database.change(free)

    async def note(self, delivery: Delivery) -> None:
        """Note a delivery that settles nothing; nothing happens where the webhook is gone."""
        there = select(webhooks.c.id).where(webhooks.c.id == delivery.webhook_id).with_for_update()
        async with self._database.write() as connection:
            if (await connection.execute(there)).one_or_none() is not None:
                await _note(connection, delivery)


def _free(now: datetime) -> tuple[ColumnElement[bool], ...]:
    """That somebody may deliver: a team whose users are all disabled is told nothing."""
    return (
        has_somebody(webhooks.c.team_id),
        webhooks.c.disabled_at.is_(None),
        or_(webhooks.c.retry_at.is_(None), webhooks.c.retry_at <= now),
        or_(webhooks.c.claimed_until.is_(None), webhooks.c.claimed_until <= now),
    )


async def _note(connection: AsyncConnection, delivery: Delivery) -> None:
    row = values(delivery)
    del row["number"]
    await connection.execute(insert(webhook_deliveries).values(row))
    mine = webhook_deliveries.c.webhook_id == delivery.webhook_id
    await keep_newest(connection, webhook_deliveries, mine, DELIVERIES_KEPT)
