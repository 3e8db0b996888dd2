"""The services that the routes of one application use."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from wrenn_sandbox.control.service.accounts import AccountService
from wrenn_sandbox.control.service.api_keys import ApiKeyService
from wrenn_sandbox.control.service.sandboxes import SandboxService
from wrenn_sandbox.control.service.snapshots import SnapshotService


@dataclass(frozen=True, slots=True)
class Services:
    accounts: AccountService
    api_keys: ApiKeyService
    sandboxes: SandboxService
    snapshots: SnapshotService


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDependency = Annotated[Services, Depends(_services)]
