"""`/v1/webhooks`: where the caller's team wants to be told of its events."""

from datetime import datetime
from typing import Annotated, Final, Self

from fastapi import APIRouter
from pydantic import Field, StringConstraints

from wrenn_sandbox.control.store import records
from wrenn_sandbox.control.store.records import Outcome, Position
from wrenn_sandbox.model.events import PATTERNS
from wrenn_sandbox.model.webhooks import DESCRIPTION_LENGTH, URL_LENGTH

from .authentication import CallerTeam
from .body import JsonBody
from .events import before_number
from .fields import (
    Argument,
    NullableInteger,
    NullableText,
    NullableTime,
    RequestModel,
    ResponseModel,
)
from .paging import PageDependency
from .responses import failures
from .services import ServicesDependency

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

_Url = Annotated[Argument, StringConstraints(max_length=URL_LENGTH)]
_Description = Annotated[Argument, StringConstraints(max_length=DESCRIPTION_LENGTH)]
_Events = Annotated[
    list[Annotated[str, StringConstraints(max_length=80)]], Field(min_length=1, max_length=PATTERNS)
]
_ALL: Final = ("*",)


class CreateWebhookRequest(RequestModel):
    """`events` are types such as `sandbox.paused`, or `sandbox.*` or `*`; all by default."""

    url: _Url
    events: _Events = Field(default=list(_ALL))
    description: _Description = ""


class UpdateWebhookRequest(RequestModel):
    """What is left out stays. `enabled` takes up deliveries where they stopped."""

    url: _Url | None = None
    events: _Events | None = None
    description: _Description | None = None
    enabled: bool | None = None


class Webhook(ResponseModel):
    """`secret`, which signs deliveries, is there only in the answer to its creation."""

    id: str
    url: str
    events: list[str]
    description: str
    enabled: bool
    disabled_reason: NullableText = None
    failing_since: NullableTime = None
    next_attempt_at: NullableTime = None
    created_at: datetime
    secret: NullableText = None

    @classmethod
    def shown(cls, webhook: records.Webhook) -> Self:
        return cls(
            id=webhook.id,
            url=webhook.url,
            events=list(webhook.patterns),
            description=webhook.description,
            enabled=webhook.disabled_at is None,
            disabled_reason=webhook.disabled_reason,
            failing_since=webhook.failing_since,
            next_attempt_at=webhook.retry_at,
            created_at=webhook.created_at,
        )


class WebhookDelivery(ResponseModel):
    """One attempt: the `status` of the answer, or the `error` for which there was none."""

    event_id: str
    type: str
    attempt: int
    outcome: Outcome
    status: NullableInteger = None
    error: NullableText = None
    duration_ms: int
    time: Annotated[datetime, Field(validation_alias="at")]


@router.post(
    "",
    operation_id="createWebhook",
    status_code=201,
    response_model_exclude_none=True,
    responses=failures(400, 401, 413, 429),
)
async def create_webhook(
    team_id: CallerTeam, services: ServicesDependency, body: JsonBody[CreateWebhookRequest]
) -> Webhook:
    """Have events delivered from now on. The answer is the only place where the secret is shown."""
    webhook = await services.webhooks.create(
        team_id, url=body.url, events=body.events, description=body.description
    )
    return Webhook.shown(webhook).model_copy(update={"secret": webhook.secret})


@router.get(
    "",
    operation_id="listWebhooks",
    response_model_exclude_none=True,
    responses=failures(400, 401),
)
async def list_webhooks(
    team_id: CallerTeam, services: ServicesDependency, page: PageDependency
) -> list[Webhook]:
    """The team's webhooks, newest first."""
    found = await services.webhooks.page(team_id, page.one_more, page.after)
    shown = page.cut(found, lambda last: Position(last.created_at, last.id))
    return [Webhook.shown(webhook) for webhook in shown]


@router.get(
    "/{id}",
    operation_id="getWebhook",
    response_model_exclude_none=True,
    responses=failures(401, 404),
)
async def get_webhook(id: str, team_id: CallerTeam, services: ServicesDependency) -> Webhook:
    """One webhook as it is now."""
    return Webhook.shown(await services.webhooks.get(team_id, id))


@router.patch(
    "/{id}",
    operation_id="updateWebhook",
    response_model_exclude_none=True,
    responses=failures(400, 401, 404, 413),
)
async def update_webhook(
    id: str,
    team_id: CallerTeam,
    services: ServicesDependency,
    body: JsonBody[UpdateWebhookRequest],
) -> Webhook:
    """Change a webhook, disable or enable it. What failed last is tried again at once."""
    webhook = await services.webhooks.change(
        team_id,
        id,
        url=body.url,
        events=body.events,
        description=body.description,
        enabled=body.enabled,
    )
    return Webhook.shown(webhook)


@router.delete(
    "/{id}",
    operation_id="deleteWebhook",
    status_code=204,
    responses=failures(401, 404),
)
async def delete_webhook(id: str, team_id: CallerTeam, services: ServicesDependency) -> None:
    """Deliver nothing more."""
    await services.webhooks.delete(team_id, id)


@router.get(
    "/{id}/deliveries",
    operation_id="listWebhookDeliveries",
    response_model_exclude_none=True,
    responses=failures(400, 401, 404),
)
async def list_webhook_deliveries(
    id: str, team_id: CallerTeam, services: ServicesDependency, page: PageDependency
) -> list[WebhookDelivery]:
    """The last 100 attempts to deliver, newest first."""
    found = await services.webhooks.deliveries(team_id, id, page.one_more, before_number(page))
    shown = page.cut(found, lambda last: Position(last.at, str(last.number)))
    return [WebhookDelivery.of(delivery) for delivery in shown]


@router.post(
    "/{id}/test",
    operation_id="testWebhook",
    response_model_exclude_none=True,
    responses=failures(401, 404, 429),
)
async def test_webhook(
    id: str, team_id: CallerTeam, services: ServicesDependency
) -> WebhookDelivery:
    """Deliver an event of the type `webhook.test` now, once, and say how that went."""
    return WebhookDelivery.of(await services.webhooks.test(team_id, id))
