"""What a team can do with its webhooks."""

from collections.abc import Sequence
from typing import Final

import msgspec

from wrenn_sandbox.control.store.records import Delivery, Position, Webhook
from wrenn_sandbox.errors import InvalidRequest, NotFound
from wrenn_sandbox.ids import (
    TeamId,
    WebhookId,
    is_id,
    new_random,
    new_webhook_id,
    new_webhook_secret,
)
from wrenn_sandbox.model.events import InvalidPattern, check_patterns
from wrenn_sandbox.model.webhooks import InvalidUrl, check_url

from .context import ControlContext
from .deliveries import Deliveries
from .events import Message

TEST: Final = "webhook.test"
_BY_TEAM: Final = "disabled by the team"


class WebhookService:
    def __init__(self, context: ControlContext, deliveries: Deliveries) -> None:
        self._store = context.store
        self._clock = context.clock
        self._allowed = context.settings.webhook_networks
        self._deliveries = deliveries

    async def create(
        self, team_id: TeamId, *, url: str, events: Sequence[str], description: str
    ) -> Webhook:
        """A webhook that is told of what happens from now on.

        Raises `InvalidRequest` for the URL or a pattern, and `QuotaExceeded`.
        """
        webhook = Webhook(
            id=new_webhook_id(),
            team_id=team_id,
            url=self._checked_url(url),
            events=_checked_events(events),
            description=description,
            secret=new_webhook_secret(),
            created_at=self._clock(),
        )
        return await self._store.team(team_id).webhooks.add(webhook)

    async def page(
        self, team_id: TeamId, limit: int | None, after: Position | None
    ) -> list[Webhook]:
        return await self._store.team(team_id).webhooks.page(limit, after)

    async def get(self, team_id: TeamId, webhook_id: str) -> Webhook:
        """Raises `NotFound`."""
        webhook = await self._store.team(team_id).webhooks.get(_id_of(webhook_id))
        if webhook is None:
            raise _not_found()
        return webhook

    async def change(
        self,
        team_id: TeamId,
        webhook_id: str,
        *,
        url: str | None,
        events: Sequence[str] | None,
        description: str | None,
        enabled: bool | None,
    ) -> Webhook:
        """Change what is given; what failed last is tried again at once.

        Raises `NotFound`, and `InvalidRequest` as `create` does.
        """
        changed: dict[str, object] = {}
        if url is not None:
            changed["url"] = self._checked_url(url)
        if events is not None:
            changed["events"] = _checked_events(events)
        if description is not None:
            changed["description"] = description
        if enabled is not None:
            changed["disabled_at"] = None if enabled else self._clock()
            changed["disabled_reason"] = None if enabled else _BY_TEAM
        webhook = await self._store.team(team_id).webhooks.change(_id_of(webhook_id), changed)
        if webhook is None:
            raise _not_found()
        return webhook

    async def delete(self, team_id: TeamId, webhook_id: str) -> None:
        """Raises `NotFound`."""
        if not await self._store.team(team_id).webhooks.remove(_id_of(webhook_id)):
            raise _not_found()

    async def deliveries(
        self, team_id: TeamId, webhook_id: str, limit: int | None, before: int | None
    ) -> list[Delivery]:
        """The last attempts to deliver, newest first; raises `NotFound`."""
        webhook = await self.get(team_id, webhook_id)
        return await self._store.team(team_id).webhooks.deliveries(webhook.id, limit, before)

    async def test(self, team_id: TeamId, webhook_id: str) -> Delivery:
        """Deliver a message of the type `webhook.test` now; raises `NotFound`, `RateLimited`."""
        webhook = await self.get(team_id, webhook_id)
        message = Message(
            id="test-" + new_random(10).hex(),
            team_id=team_id,
            type=TEST,
            time=self._clock(),
            data=msgspec.Raw(msgspec.json.encode({"webhook_id": webhook.id})),
        )
        return await self._deliveries.test(webhook, message)

    def _checked_url(self, url: str) -> str:
        try:
            check_url(url, self._allowed)
        except InvalidUrl as error:
            raise InvalidRequest(f"url: {error}") from error
        return url


def _checked_events(events: Sequence[str]) -> str:
    try:
        check_patterns(events)
    except InvalidPattern as error:
        raise InvalidRequest(f"events: {error}") from error
    return " ".join(dict.fromkeys(events))


def _id_of(text: str) -> WebhookId:
    if not is_id("wh", text):
        raise _not_found()
    return WebhookId(text)


def _not_found() -> NotFound:
    return NotFound("There is no such webhook")
