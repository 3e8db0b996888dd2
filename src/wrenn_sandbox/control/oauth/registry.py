"""All providers. A new one is one class here, and its settings."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from wrenn_sandbox.errors import ProviderNotFound
from wrenn_sandbox.settings import OAuthSettings

from .github import GitHub
from .http import ProviderHttp, failed, provider_http
from .provider import Authorization, Grant, Profile, Provider

_CLASSES: Final[tuple[type[Provider], ...]] = (GitHub,)
NAMES: Final = tuple(each.name for each in _CLASSES)


@dataclass(frozen=True, slots=True)
class Reachable:
    """A configured provider, the way to it and how long, in seconds, an exchange may take."""

    provider: Provider
    http: ProviderHttp
    timeout: float

    @property
    def name(self) -> str:
        return self.provider.name

    def authorization_url(self, authorization: Authorization) -> str:
        return self.provider.authorization_url(authorization)

    async def profile(self, grant: Grant) -> Profile:
        """Who has consented; raises `ExchangeFailed`, in time."""
        try:
            async with asyncio.timeout(self.timeout):
                return await self.provider.profile(self.http, grant)
        except TimeoutError:
            raise failed("too slow") from None


class Providers:
    """Those providers that the settings configure."""

    def __init__(self, reachable: Mapping[str, Reachable]) -> None:
        self._reachable = reachable

    def get(self, name: str) -> Reachable:
        """Raises `ProviderNotFound`."""
        reachable = self._reachable.get(name)
        if reachable is None:
            raise ProviderNotFound("This server has no such login provider")
        return reachable


@asynccontextmanager
async def open_providers(settings: OAuthSettings) -> AsyncIterator[Providers]:
    """The configured providers, which can be asked as long as the block lasts."""
    given = (each.configured(settings) for each in _CLASSES)
    configured = [each for each in given if each is not None]
    if not configured:
        yield Providers({})
        return
    timeout = settings.oauth_timeout_sec
    async with provider_http(timeout) as http:
        yield Providers({each.name: Reachable(each, http, timeout) for each in configured})
