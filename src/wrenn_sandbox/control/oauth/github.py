"""GitHub and GitHub Enterprise Server.

Formats: https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/authorizing-oauth-apps
and https://docs.github.com/en/rest/users. A failed exchange of a code is answered there with
status 200 and an `error` in place of the token.
"""

from typing import Annotated, ClassVar, Final
from urllib.parse import urlencode, urlsplit

import msgspec
from msgspec import Meta

from wrenn_sandbox.settings import OAuthSettings

from .http import ProviderHttp, failed
from .provider import Profile, Provider

_SCOPE: Final = "user:email"
_API_OF_GITHUB: Final = "https://api.github.com"


class _Token(msgspec.Struct):
    access_token: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._~+/=-]{1,1024}\Z")]
    token_type: Annotated[str, Meta(pattern=r"^(?i:bearer)\Z")]


class _User(msgspec.Struct):
    id: Annotated[int, Meta(gt=0, le=2**63 - 1)]


class _Email(msgspec.Struct):
    email: str
    primary: bool
    verified: bool


class GitHub(Provider):
    name: ClassVar[str] = "github"

    @staticmethod
    def is_configured(settings: OAuthSettings) -> bool:
        return None not in (settings.oauth_github_client_id, settings.oauth_github_client_secret)

    def __init__(self, settings: OAuthSettings, http: ProviderHttp) -> None:
        client_id, secret = settings.oauth_github_client_id, settings.oauth_github_client_secret
        assert client_id is not None
        assert secret is not None
        self._client_id = client_id
        self._client_secret = secret.get_secret_value()
        self._url = settings.oauth_github_url
        self._api_url = settings.oauth_github_api_url or _api_url(self._url)
        self._http = http

    def authorization_url(self, *, redirect_uri: str, state: str, challenge: str) -> str:
        query = {
            "client_id": self._client_id,
            "redirect_uri": redirect_uri,
            "response_type": "code",
            "scope": _SCOPE,
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        return f"{self._url}/login/oauth/authorize?{urlencode(query)}"

    async def profile(self, *, code: str, redirect_uri: str, verifier: str) -> Profile:
        token = await self._http.post(
            f"{self._url}/login/oauth/access_token",
            {"Accept": "application/json"},
            {
                "grant_type": "authorization_code",
                "client_id": self._client_id,
                "client_secret": self._client_secret,
                "code": code,
                "redirect_uri": redirect_uri,
                "code_verifier": verifier,
            },
            _Token,
        )
        headers = {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {token.access_token}",
        }
        user = await self._http.get(f"{self._api_url}/user", headers, _User)
        url = f"{self._api_url}/user/emails?per_page=100"
        emails = await self._http.get(url, headers, list[_Email])
        primary = next((each.email for each in emails if each.primary and each.verified), None)
        if primary is None:
            raise failed("no verified primary email")
        return Profile(subject=str(user.id), email=primary)


def _api_url(url: str) -> str:
    """The API that belongs to login pages: an Enterprise Server has its own below them."""
    return _API_OF_GITHUB if urlsplit(url).hostname == "github.com" else f"{url}/api/v3"
