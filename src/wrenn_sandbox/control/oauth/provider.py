"""What a provider of identities has to do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from wrenn_sandbox.settings import OAuthSettings

from .http import ProviderHttp


@dataclass(frozen=True, slots=True)
class Profile:
    """Who somebody is at a provider.

    `subject` names a person there for ever and is never given to another; `email` is an address
    of theirs that the provider has verified.
    """

    subject: str
    email: str


class Provider(ABC):
    """One provider; `name` is its place in URLs and in the database, lower-case letters."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def is_configured(settings: OAuthSettings) -> bool:
        """Whether the settings have what the provider needs."""

    @abstractmethod
    def __init__(self, settings: OAuthSettings, http: ProviderHttp) -> None: ...

    @abstractmethod
    def authorization_url(self, *, redirect_uri: str, state: str, challenge: str) -> str:
        """The page that asks a browser's user for consent; `challenge` is PKCE's, method S256."""

    @abstractmethod
    async def profile(self, *, code: str, redirect_uri: str, verifier: str) -> Profile:
        """Who has consented, by what the browser brought back; raises `ExchangeFailed`."""
