"""The services that the routes of one application use."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from wrenn_sandbox.control.service.accounts import AccountService
from wrenn_sandbox.control.service.api_keys import ApiKeyService
from wrenn_sandbox.control.service.callers import Revocations
from wrenn_sandbox.control.service.draining import Draining
from wrenn_sandbox.control.service.events import EventFeed
from wrenn_sandbox.control.service.guests import GuestService
from wrenn_sandbox.control.service.history import HistoryService
from wrenn_sandbox.control.service.idempotency import Idempotency
from wrenn_sandbox.control.service.oauth import OAuthService
from wrenn_sandbox.control.service.ports import PortService
from wrenn_sandbox.control.service.sandboxes import SandboxService
from wrenn_sandbox.control.service.secrets import SecretService
from wrenn_sandbox.control.service.snapshots import SnapshotService
from wrenn_sandbox.control.service.webhooks import WebhookService


@dataclass(frozen=True, slots=True)
class Services:
    accounts: AccountService
    api_keys: ApiKeyService
    sandboxes: SandboxService
    snapshots: SnapshotService
    idempotency: Idempotency
    guests: GuestService
    history: HistoryService
    oauth: OAuthService
    revocations: Revocations
    draining: Draining
    events: EventFeed
    webhooks: WebhookService
    ports: PortService
    secrets: SecretService


def services_of(connection: HTTPConnection) -> Services:
    """The services of the application that answers this request."""
    services = connection.app.state.services
    assert isinstance(services, Services)
    return services


async def _services(connection: HTTPConnection) -> Services:
    return services_of(connection)


ServicesDependency = Annotated[Services, Depends(_services)]
