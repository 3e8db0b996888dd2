"""What a provider of identities has to do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

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


@dataclass(frozen=True, slots=True)
class Authorization:
    """Where and how a browser asks a provider for its user's consent."""

    redirect_uri: str
    state: str
    challenge: str
    """PKCE, method S256."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a browser brought back from its provider, and what proves that it set out here."""

    code: str
    redirect_uri: str
    verifier: str


class Provider(ABC):
    """One provider; `name` is its place in URLs and in the database, lower-case letters."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def configured(cls, settings: OAuthSettings) -> Self | None:
        """The provider as the settings have it, None where they do not."""

    @abstractmethod
    def authorization_url(self, authorization: Authorization) -> str:
        """The page to which the browser is sent."""

    @abstractmethod
    async def profile(self, http: ProviderHttp, grant: Grant) -> Profile:
        """Who has consented; raises `ExchangeFailed`."""
