"""What happens to what the team has, and the webhooks that are told of it."""

from collections.abc import AsyncIterator, Sequence

from wrenn_sandbox.client.aside import async_sleep
from wrenn_sandbox.client.errors import ApiError, ConnectionFailed, UnexpectedAnswer
from wrenn_sandbox.client.models import TeamEvent, Webhook, WebhookDelivery
from wrenn_sandbox.client.transport import (
    EVENTS_SILENCE_SEC,
    RECONNECT_LONGEST_SEC,
    RECONNECT_SEC,
    decode,
    given,
    http_failures,
    path_of,
)

from .api import AsyncApi


class AsyncEvents:
    """Events of the team: of its sandboxes, snapshots and API keys."""

    def __init__(self, api: AsyncApi) -> None:
        self._api = api

    async def list(self, limit: int | None = None) -> tuple[TeamEvent, ...]:
        """The last ones, newest first: those of some days, at most `limit`."""
        params = given(limit=None if limit is None else str(limit))
        return await self._api.call("GET", "/v1/events", tuple[TeamEvent, ...], params=params)

    async def follow(self, after: str | None = None) -> AsyncIterator[TeamEvent]:
        """What happens from now on, or has happened since the event with the id `after`.

        A connection that breaks is made again, for ever, and no event is missed or comes twice.
        `Gone`: what follows `after`, or the event before a long break, is not kept any more.
        `ConnectionFailed`: the server was not reached to begin with.
        """
        position, wait, reached = after, RECONNECT_SEC, False
        while True:
            headers = given(**{"Last-Event-ID": position})
            try:
                async with self._api.receive(
                    "/v1/events/stream", None, "GET", headers=headers, timeout=EVENTS_SILENCE_SEC
                ) as response:
                    reached, wait = True, RECONNECT_SEC
                    id, data = position, ""
                    with http_failures():
                        async for line in response.aiter_lines():
                            name, _, value = line.partition(": ")
                            if name == "id":
                                id = value
                            elif name == "data":
                                data = value
                            elif not line:
                                position, told, data = id, data, ""
                                if told:
                                    yield decode(told.encode(), TeamEvent)
            except ConnectionFailed:
                if not reached:
                    raise
            except (ApiError, UnexpectedAnswer) as error:
                if not reached or error.status < 429:
                    raise
            await async_sleep(wait)
            wait = min(2 * wait, RECONNECT_LONGEST_SEC)


class AsyncWebhooks:
    """Where the team's events are delivered to. `NotFound`: there is no webhook of that id."""

    def __init__(self, api: AsyncApi) -> None:
        self._api = api

    async def create(
        self, url: str, *, events: Sequence[str] | None = None, description: str | None = None
    ) -> Webhook:
        """Have events delivered from now on: types, `sandbox.*` and the like, or all of them.

        `secret` of the answer is the only place where it is ever shown.
        """
        body = given(url=url, events=events, description=description)
        return await self._api.call("POST", "/v1/webhooks", Webhook, body)

    async def list(self) -> tuple[Webhook, ...]:
        """All of them, newest first."""
        return await self._api.call("GET", "/v1/webhooks", tuple[Webhook, ...])

    async def get(self, id: str) -> Webhook:
        """How it is now."""
        return await self._api.call("GET", _path(id), Webhook)

    async def update(
        self,
        id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """Change what is given. What failed last is tried again at once."""
        body = given(url=url, events=events, description=description, enabled=enabled)
        return await self._api.call("PATCH", _path(id), Webhook, body)

    async def delete(self, id: str) -> None:
        """Deliver nothing more."""
        await self._api.request("DELETE", _path(id))

    async def deliveries(self, id: str) -> tuple[WebhookDelivery, ...]:
        """The last attempts to deliver, newest first."""
        path = _path(id) + "/deliveries"
        return await self._api.call("GET", path, tuple[WebhookDelivery, ...])

    async def test(self, id: str) -> WebhookDelivery:
        """Deliver an event of the type `webhook.test` now, and say how that went."""
        return await self._api.call("POST", _path(id) + "/test", WebhookDelivery)


def _path(id: str) -> str:
    return path_of("v1", "webhooks", id)
