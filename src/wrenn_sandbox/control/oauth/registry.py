"""All providers. A new one is one class here, and its settings."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from wrenn_sandbox.settings import OAuthSettings

from .github import GitHub
from .http import provider_http
from .provider import Provider

_CLASSES: Final[tuple[type[Provider], ...]] = (GitHub,)
NAMES: Final = tuple(each.name for each in _CLASSES)


@asynccontextmanager
async def open_providers(settings: OAuthSettings) -> AsyncIterator[Mapping[str, Provider]]:
    """The configured providers by name, which can be asked as long as the block lasts."""
    configured = [each for each in _CLASSES if each.is_configured(settings)]
    if not configured:
        yield {}
        return
    async with provider_http(settings.oauth_timeout_sec) as http:
        yield {each.name: each(settings, http) for each in configured}
