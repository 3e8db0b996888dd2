"""All providers. A new one is one class here, and its settings."""

from collections.abc import Mapping
from typing import Final

from wrenn_sandbox.errors import ProviderNotFound
from wrenn_sandbox.settings import Settings

from .github import GitHub
from .provider import Provider

_CLASSES: Final[tuple[type[Provider], ...]] = (GitHub,)
NAMES: Final = tuple(each.name for each in _CLASSES)


class Providers:
    """Those providers that the settings configure."""

    def __init__(self, settings: Settings) -> None:
        given = (each.configured(settings) for each in _CLASSES)
        self._by_name: Mapping[str, Provider] = {
            each.name: each for each in given if each is not None
        }

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def get(self, name: str) -> Provider:
        """Raises `ProviderNotFound`."""
        provider = self._by_name.get(name)
        if provider is None:
            raise ProviderNotFound("This server knows no login with such a provider")
        return provider
